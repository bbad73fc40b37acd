"""The zoo's table in docs/verification.md is true; no honest node is accused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from faults.breaking import BREAKING
from faults.computing import COMPUTING
from harness.small_models import Models
from zoo.cheaters import Found, measure
from zoo.honest import WAYS, honest_audits
from zoo.protocol import SCENARIOS, perform
from zoo.run import PAGE
from zoo.table import read_table, sessions_to_99, to_99


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def found() -> dict[str, Found]:
    return measure(2, seed=1)


@pytest.fixture(scope="module")
def models() -> Iterator[Models]:
    models = Models()
    yield models
    models.close()


def test_the_table_lists_every_cheater() -> None:
    assert list(read_table(PAGE)) == [*COMPUTING, *SCENARIOS]
    assert {name for scenario in SCENARIOS.values() for name in scenario.who.values()} == set(BREAKING)


@pytest.mark.parametrize("name", COMPUTING)
def test_who_computes_wrongly_is_caught_in_its_first_audit(name: str, found: dict[str, Found]) -> None:
    assert found[name].audits == 6 and found[name].caught == 6
    what, check, detected, _, audits = read_table(PAGE)[name]
    assert (what, check, detected) == (COMPUTING[name].what, "`hash`", "1.00")
    assert audits.startswith("1,")


@pytest.mark.parametrize("name", SCENARIOS)
def test_who_breaks_the_protocol_is_caught_by_the_check_named_for_it(name: str, models: Models, tmp_path: Path) -> None:
    scenario = SCENARIOS[name]
    outcome = perform(models, scenario, tmp_path)
    assert scenario.check in outcome.checks, outcome
    assert not outcome.innocent and not outcome.overpaid
    assert outcome.is_right and not outcome.error, "the session went on with honest nodes"
    _, check, detected, _, audits = read_table(PAGE)[name]
    assert (check, detected) == (f"`{scenario.check}`", "1.00")
    assert audits.startswith("1," if scenario.audits else "0,")


def test_no_honest_node_is_accused() -> None:
    tally = honest_audits(300, seed=2)
    assert not tally.accused
    assert set(tally.audits) == set(WAYS) and tally.audits.total() >= 300


@pytest.mark.nightly
def test_no_honest_node_is_accused_in_ten_thousand_audits() -> None:
    tally = honest_audits(10_000, seed=3)
    assert not tally.accused and tally.audits.total() >= 10_000


def test_audits_to_99_percent() -> None:
    assert (to_99(1.0), to_99(0.5), to_99(0.0)) == (1, 7, None)
    assert sessions_to_99(1.0) == 275
