"""How many tokens are drafted, in simulation: much where drafts are right, nothing where they cost."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import takewhile

import pytest

from tallystick.speculation.pace import Limits, Pace


@dataclass
class Run:
    tokens: int = 0
    rows: int = 0
    passes: int = 0
    seconds: float = 0.0


def simulate(
    pace: Pace,
    right: list[float],
    row_s: float,
    *,
    seed: int = 0,
    plain_s: float = 1.0,
    noise: float = 0.1,
    draft_s: float = 0.0,
    known: bool = True,
) -> Run:
    """One answer. right: for each token, how probably a draft of it is right. draft_s: to draft a token."""
    chance, run = random.Random(seed), Run()
    while run.tokens < len(right):
        k = pace.drafts(31)
        hits = [chance.random() < p for p in right[run.tokens : run.tokens + k]]
        accepted = sum(takewhile(bool, hits))
        seconds = (plain_s + len(hits) * row_s) * chance.uniform(1 - noise, 1 + noise) + len(hits) * draft_s
        run.seconds += seconds
        if not k and pace.may_look(draft_s):
            run.seconds += draft_s
            pace.looked(chance.random() < right[run.tokens], draft_s)
        pace.passed(len(hits), accepted, seconds if known else None)
        run.tokens += accepted + 1
        run.rows += len(hits) + 1
        run.passes += 1
    return run


@pytest.mark.parametrize("limits", [Limits(), Limits(chance=0.2, gain=1.0)])
@pytest.mark.parametrize("row_s", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("right", [0.0, 0.1, 0.3, 0.6, 0.9])
def test_never_five_percent_slower_than_plain_decoding(limits: Limits, row_s: float, right: float) -> None:
    for seed in range(10):
        run = simulate(Pace(limits), [right] * 150, row_s, seed=seed)
        assert run.seconds <= 1.05 * run.tokens * 1.02  # the noise of 150 passes


@pytest.mark.parametrize("draft_s", [0.2, 3.0])
def test_a_slow_drafter_that_is_wrong_costs_little(draft_s: float) -> None:
    for seed in range(10):
        run = simulate(Pace(Limits(chance=0.2, gain=1.0)), [0.0] * 200, 0.05, seed=seed, draft_s=draft_s)
        assert run.seconds <= 1.05 * run.tokens * 1.02


def test_wrong_drafts_are_hardly_paid_for_and_right_ones_save_most_passes() -> None:
    wrong = simulate(Pace(), [0.05] * 400, 0.02)
    assert wrong.rows <= 1.05 * wrong.tokens and wrong.passes >= 0.95 * wrong.tokens
    for right, passes, rows in ((0.5, 0.9, 1.4), (0.9, 0.30, 1.5), (1.0, 0.10, 1.1)):
        run = simulate(Pace(), [right] * 400, 0.02)
        assert run.passes <= passes * run.tokens, right
        assert run.rows <= rows * run.tokens, right


def test_it_begins_again_where_the_text_begins_to_repeat_itself() -> None:
    text = [0.02] * 200 + [0.98] * 200 + [0.02] * 200
    run = simulate(Pace(), text, 0.02)
    assert run.passes <= 200 + 60 + 200 and run.rows <= 1.15 * run.tokens


def test_rows_that_take_as_long_as_passes_are_not_worth_it() -> None:
    run = simulate(Pace(), [0.9] * 300, 1.0)
    assert run.seconds <= 1.05 * run.tokens and run.rows <= 1.2 * run.tokens


def test_one_long_pass_is_not_taken_for_the_rule() -> None:
    pace = Pace()
    for _ in range(5):
        pace.passed(0, 0, 1.0)
    before = pace.drafts(16)
    pace.passed(2, 2, 100.0)
    for _ in range(30):
        pace.passed(0, 0, 1.0)
        pace.looked(True, 0.0)
    assert pace.drafts(16) >= before > 0
    assert pace.lost_s <= 3.0


def test_without_times_nothing_is_drafted() -> None:
    assert simulate(Pace(), [1.0] * 50, 0.0, known=False).rows == 50
