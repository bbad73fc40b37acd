"""scripts/chaos ends with one JSON object, whatever happens."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tallystick_devnet import chaos
from tallystick_devnet.chaos import Tally, main


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_a_run_that_breaks_off_says_so_in_json_and_by_its_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(_: object, __: object, ___: object, tally: Tally) -> None:
        tally.sessions, tally.identical = 3, 2
        raise ExceptionGroup("several", [RuntimeError("a node did not start")])

    monkeypatch.setattr(chaos, "run_chaos", run)
    assert main(["--json"]) == 1
    told = last_line(capsys)
    assert told["broken"] == "RuntimeError: a node did not start"
    assert (told["sessions"], told["answers_identical"], told["lost"]) == (3, 2, 0)


@pytest.mark.parametrize(
    ("found", "status"),
    [(Tally(), 0), (Tally(different=1), 1), (Tally(lost=["x"]), 1), (Tally(leaks=["x"]), 1), (Tally(not_opened=1), 0)],
)
def test_what_was_lost_differed_or_leaked_is_the_status(
    found: Tally, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: object, __: object, ___: object, tally: Tally) -> None:
        for name in ("different", "lost", "leaks", "not_opened"):
            setattr(tally, name, getattr(found, name))

    monkeypatch.setattr(chaos, "run_chaos", run)
    assert main(["--json"]) == status
    assert last_line(capsys)["broken"] is None
