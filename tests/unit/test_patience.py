"""Limits that are learnt from durations, and how far a hop is seen to come."""

from __future__ import annotations

import pytest

from tallystick.session.patience import ENOUGH, Patience
from tallystick.session.watch import FRAME_LIMIT_S, STEP_FLOOR_S, STEP_LIMIT_S, Progress


def test_before_enough_is_known_the_limit_is_the_highest_that_there_is() -> None:
    patience = Patience(1.5, 10.0)
    for _ in range(ENOUGH - 1):
        patience.note(0.1)
    assert patience.limit_s == 10.0 and not patience.is_informed
    patience.note(0.1)
    assert patience.limit_s == 1.5 and patience.is_informed


def test_the_limit_grows_with_the_longest_and_never_beyond_the_highest() -> None:
    patience = Patience(1.5, 10.0)
    for _ in range(ENOUGH):
        patience.note(1.0)
    assert patience.limit_s == 4.0
    for seconds in (3.9, 9.9, 9.9):
        patience.note(seconds)
    assert patience.limit_s == 10.0


@pytest.mark.parametrize("pause_s", [1.6, 9.0, 30.0, 1e9])
def test_a_pause_beyond_the_limit_teaches_nothing(pause_s: float) -> None:
    patience = Patience(1.5, 10.0)
    for _ in range(ENOUGH):
        patience.note(0.1)
    patience.note(pause_s)
    assert patience.limit_s == 1.5


def test_a_hops_time_runs_while_it_has_something_to_compute() -> None:
    progress, now = Progress(0.0), 0.0
    for position in range(ENOUGH):
        assert not progress.note(position, position, now + 5.0)  # nothing to do, for 5 s
        now += 5.1
        assert progress.note(position + 1, position + 1, now)  # a step that took 0.1 s
    assert progress.patience(ENOUGH + 1).limit_s == STEP_FLOOR_S
    assert progress.patience(ENOUGH + 17).limit_s == FRAME_LIMIT_S


def test_rows_that_it_had_before_a_crop_are_no_progress_a_second_time() -> None:
    progress = Progress(0.0)
    assert progress.note(10, 10, 1.0)
    assert not progress.note(9, 10, 2.0) and not progress.note(10, 10, 3.0)
    progress.forget(8)
    assert not progress.note(8, 9, 4.0) and progress.note(9, 9, 5.0)


def test_signing_counts_once() -> None:
    progress = Progress(0.0)
    assert progress.note_signed(32) and not progress.note_signed(32) and not progress.note_signed(0)
    progress.forget(20)
    assert progress.note_signed(32)


def test_a_hop_is_never_waited_for_longer_than_its_highest_limit() -> None:
    progress = Progress(0.0)
    for position in range(1, 100):
        progress.note(position, position, position * STEP_LIMIT_S * 0.9)
    assert progress.patience(100).limit_s == STEP_LIMIT_S
