"""The zoo's table in docs/verification.md is true; no honest node is accused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from faults.breaking import BREAKING
from faults.computing import COMPUTING, KNOWN_CHALLENGE
from harness.small_models import Models
from tallystick_devnet import economics
from tallystick_protocol.manifest import Numerics
from tallystick_protocol.sketching.thresholds import Zone, thresholds
from tallystick_protocol.types import WINDOW
from zoo.across import BUDGET, HONEST, LENGTH_ACROSS, entered, judge, measure_across, windows_of
from zoo.audits import serve
from zoo.cheaters import Found, measure, spoilt, walk
from zoo.honest import WAYS, honest_audits
from zoo.other_class import Answer
from zoo.protocol import SCENARIOS, perform
from zoo.run import PAGE
from zoo.table import read_table, sessions_to_99, to_99

SLOW = ("int8", "corrupt_row", "under_tolerance")
"""Cheaters that lie between the zones of other classes, or below them."""

PROMISED = economics.audited_windows(economics.PRICE, 3, 0.01, 1000)
"""Windows within which a cheater must be found: of two layers and the head, which earn most (docs/court.md)."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def found() -> dict[str, Found]:
    return measure(1, seed=1)


def test_the_table_lists_every_cheater() -> None:
    assert list(read_table(PAGE)) == [*COMPUTING, *SCENARIOS]
    assert {name for scenario in SCENARIOS.values() for name in scenario.who.values()} == set(BREAKING)


@pytest.mark.parametrize("name", COMPUTING)
def test_who_computes_wrongly_is_caught_in_its_first_audit(name: str, found: dict[str, Found]) -> None:
    assert found[name].caught == found[name].audits == (3 if COMPUTING[name].at_end else 2)
    what, check, detected, _, _, audits, _ = read_table(PAGE)[name]
    assert (what, check, detected) == (COMPUTING[name].what, "`hash`", "1.00")
    assert audits.startswith("1,")


@pytest.mark.parametrize("name", SCENARIOS)
def test_who_breaks_the_protocol_is_caught_by_the_check_named_for_it(name: str, models: Models, tmp_path: Path) -> None:
    scenario = SCENARIOS[name]
    outcome = perform(models, scenario, tmp_path)
    assert scenario.check in outcome.checks, outcome
    assert not outcome.innocent and not outcome.overpaid
    assert outcome.is_right and not outcome.error, "the session went on with honest nodes"
    _, check, detected, _, _, audits, _ = read_table(PAGE)[name]
    assert (check, detected) == (f"`{scenario.check}`", "1.00")
    assert audits.startswith("1," if scenario.audits else "0,")


def test_no_honest_node_is_accused() -> None:
    tally = honest_audits(150, seed=2)
    assert not tally.accused
    assert set(tally.audits) == set(WAYS) and tally.audits.total() >= 150


@pytest.mark.nightly
def test_no_honest_node_is_accused_in_ten_thousand_audits() -> None:
    tally = honest_audits(10_000, seed=3)
    assert not tally.accused and tally.audits.total() >= 10_000


def test_an_error_in_the_null_space_passes_under_a_known_challenge_and_fails_under_a_later_one() -> None:
    """Why the challenge comes after the receipts."""
    span, right, tasks = next(walk(1, 1, "fp32"))
    task, model = tasks[0], spoilt(span, "null_space", "fp32")
    honest, liar = serve(right, tasks)[0].record._outputs, serve(model, tasks)[0].record._outputs
    answer, x, limits = Answer(honest, None), entered(right, task), thresholds(model.manifest, span)
    known, later = (
        windows_of(model, task, x, liar, answer, lambda drawn=drawn: drawn)  # type: ignore[misc]
        for drawn in (KNOWN_CHALLENGE, bytes(range(32)))
    )
    assert limits.zone(known[:1]) is Zone.CLEAR
    assert limits.zone(later[:1]) is Zone.GUILTY


@pytest.mark.nightly
@pytest.mark.parametrize(("numerics", "column", "place"), [("fp32", 3, 1), ("bf16w", 4, 2)])
def test_the_table_says_what_another_class_finds(numerics: Numerics, column: int, place: int) -> None:
    found, table = measure_across(8, 0, numerics), read_table(PAGE)
    assert judge(found[HONEST], 0).detected == 0
    for name in COMPUTING:
        needed = judge(found[name], 0)
        assert needed.detected == pytest.approx(float(table[name][column]), abs=0.01), name
        assert needed.windows_to_99 is not None and needed.windows_to_99 <= PROMISED, name
    for name in SLOW:
        needed, (*_, audits, windows) = judge(found[name], 0), table[name]
        stated = int(audits.split(", ")[place]), int(windows.split(", ")[place - 1])
        for count, told in zip((needed.audits_to_99, needed.windows_to_99), stated, strict=True):
            assert count is not None and told / 2 <= count <= 2 * told, name


@pytest.mark.parametrize("name", COMPUTING)
def test_who_computes_wrongly_is_found_by_other_classes_within_what_the_economics_promise(name: str) -> None:
    *_, fp32, bf16w, audits, windows = read_table(PAGE)[name]
    assert float(fp32) >= 0.99 and float(bf16w) >= 0.99
    assert all(count.isdigit() for count in audits.split(", "))
    assert all(0 < int(count) <= PROMISED for count in windows.split(", "))
    assert BUDGET * LENGTH_ACROSS <= PROMISED * WINDOW, "who is not found in the zoo's horizon may still be in time"


def test_audits_to_99_percent() -> None:
    assert (to_99(1.0), to_99(0.5), to_99(0.0)) == (1, 7, None)
    assert sessions_to_99(1.0) == 275
