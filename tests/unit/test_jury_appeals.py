"""When a node appeals by itself, and how it stays within its budget, whatever is killed when."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from harness import samples
from tallystick_node.jury.appealing import Side, has_begun, is_worth_it, side_in
from tallystick_node.jury.judging import Finding
from tallystick_node.jury.ledger import Ledger
from tallystick_protocol.chain.court import State, Verdict, Vote
from tallystick_protocol.chain.docket import Opening, Standing, Times
from tallystick_protocol.types import Digest, Wei

CASE, OTHER = samples.digest("case"), samples.digest("other")
NODE, PAYER = samples.address("node"), samples.address("payer")
RIGHT = Finding(same_class=True, equal=True, clear=1e-6, guilty=1e-4)
WRONG = replace(RIGHT, equal=False, error=1.0)
SLIGHTLY = replace(RIGHT, equal=False, error=1e-5)
PASSIVE = {Verdict.MISSED, Verdict.VOID, Verdict.UNREADABLE}


def opening(accused: str, accuser: str) -> Opening:
    receipt, evidence = samples.digest("receipt"), samples.digest("evidence")
    return Opening(CASE, samples.address(accused), samples.address(accuser), receipt, evidence, Wei(1), 7, b"\1" * 32)


def test_a_node_is_accused_accuser_or_juror() -> None:
    assert side_in(opening("node", "x"), NODE, PAYER, None) is Side.ACCUSED
    assert side_in(opening("x", "node"), NODE, PAYER, None) is Side.ACCUSER
    assert side_in(opening("x", "payer"), NODE, PAYER, Vote.CLEAR) is Side.ACCUSER  # it accused by its hot key
    assert side_in(opening("x", "y"), NODE, PAYER, Vote.CLEAR) is Side.JUROR
    assert side_in(opening("x", "y"), NODE, PAYER, None) is None


@pytest.mark.parametrize(
    ("side", "finding", "vote", "against"),
    [
        (Side.ACCUSED, RIGHT, None, {Verdict.GUILTY, Verdict.FAULT}),
        (Side.ACCUSED, WRONG, None, set()),  # it was found out, or found wrong in its favour
        (Side.ACCUSED, SLIGHTLY, None, set()),
        (Side.ACCUSER, RIGHT, None, set()),  # it was mistaken
        (Side.ACCUSER, WRONG, None, {Verdict.CLEAR}),
        (Side.ACCUSER, SLIGHTLY, None, {Verdict.CLEAR}),
        (Side.JUROR, RIGHT, Vote.CLEAR, {Verdict.GUILTY, Verdict.FAULT}),
        (Side.JUROR, WRONG, Vote.GUILTY, {Verdict.CLEAR}),
        (Side.JUROR, WRONG, Vote.FAULT, {Verdict.CLEAR}),
        (Side.JUROR, RIGHT, Vote.ABSTAIN, set()),  # it had not found out in time
        (Side.JUROR, RIGHT, None, set()),
    ],
)
def test_it_appeals_against_the_opposite_of_what_it_found(
    side: Side, finding: Finding, vote: Vote | None, against: set[Verdict]
) -> None:
    assert {said for said in Verdict if is_worth_it(side, finding, vote, said)} == against
    assert not against & PASSIVE


@pytest.mark.parametrize(
    "finding",
    [
        Finding("unreadable", "torn"),
        Finding("unable", "memory"),
        replace(RIGHT, same_class=False, equal=False, error=1e-7),  # clear to a juror of another class
        replace(WRONG, same_class=False, error=1.0, spread=0.0),  # guilty to one
    ],
)
@pytest.mark.parametrize("side", Side)
def test_who_cannot_know_better_appeals_against_nothing(side: Side, finding: Finding) -> None:
    assert not any(is_worth_it(side, finding, vote, said) for said in Verdict for vote in (*Vote, None))


def test_parties_appeal_at_once_and_jurors_in_the_second_half() -> None:
    times = Times(commit=400, reveal=100, appeal=200, headers=50)
    drawn = Standing(NODE, 0, PAYER, State.DRAWN, Verdict.MISSED, 0, 160, 10, 1000)
    assert [has_begun(Side.ACCUSED, drawn, times, now) for now in (1099, 1100)] == [False, True]
    assert [has_begun(Side.JUROR, drawn, times, now) for now in (1199, 1200)] == [False, True]


def test_bonds_that_are_out_or_lost_count_against_the_budget_until_they_come_back(tmp_path: Path) -> None:
    ledger, budget = Ledger(tmp_path / "jury.db"), Wei(300)

    def pledge(case: Digest, round_: int, bond: int, others: bool = False) -> bool:
        return ledger.pledge(case, round_, Wei(bond), others, budget)

    assert not pledge(CASE, 0, 301)
    assert pledge(CASE, 0, 100) and pledge(CASE, 0, 100)  # again is the same as once
    assert pledge(CASE, 1, 200)
    ledger.close()
    ledger = Ledger(tmp_path / "jury.db")  # and stays so over a restart
    assert ledger.pledges(CASE) == [0, 1]
    assert not pledge(OTHER, 0, 1)
    assert pledge(OTHER, 0, 300, others=True)  # which have a budget of their own
    ledger.end_pledge(CASE, 0, is_lost=False)
    ledger.end_pledge(CASE, 1, is_lost=True)
    assert ledger.pledges(CASE) == []
    assert not pledge(OTHER, 1, 101)
    assert pledge(OTHER, 1, 100)
    ledger.close()
