"""What is due in a case, at both sides of every moment; and a juror's book, which never takes anything back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from harness import samples
from tallystick_node.jury.duties import TURNS, Duty, duty_in, is_late, turns
from tallystick_node.jury.judging import Finding
from tallystick_node.jury.ledger import Ledger
from tallystick_protocol.chain.court import State, Verdict, Vote, commitment
from tallystick_protocol.chain.docket import (
    MAX_HINT_BYTES,
    Ballot,
    Opening,
    Standing,
    Times,
    encode_sources,
    is_fined,
    is_silent,
    parse_sources,
)
from tallystick_protocol.errors import ConfigError
from tallystick_protocol.types import Wei

TIMES = Times(commit=400, reveal=100, appeal=200, headers=50)
OPEN = Standing(
    samples.address("accuser"), 0, samples.address("accused"), State.OPEN, Verdict.MISSED, 0, 160, seed_block=10,
    commit_end=0,
)  # fmt: skip
DRAWN = replace(OPEN, state=State.DRAWN, commit_end=1000)
CASE = samples.digest("case")


@pytest.mark.parametrize(
    ("standing", "block", "now", "said", "duty"),
    [
        (OPEN, 10, 0, Verdict.MISSED, Duty.WAIT),
        (OPEN, 11, 0, Verdict.MISSED, Duty.DRAW),
        (OPEN, 60, 0, Verdict.MISSED, Duty.DRAW),
        (OPEN, 61, 0, Verdict.MISSED, Duty.RETARGET),
        (DRAWN, 0, 999, Verdict.MISSED, Duty.VOTE),
        (DRAWN, 0, 1000, Verdict.MISSED, Duty.REVEAL),
        (DRAWN, 0, 1099, Verdict.GUILTY, Duty.REVEAL),
        (DRAWN, 0, 1100, Verdict.MISSED, Duty.REDRAW),
        (DRAWN, 0, 1100, Verdict.GUILTY, Duty.APPEAL),
        (DRAWN, 0, 1299, Verdict.VOID, Duty.APPEAL),
        (DRAWN, 0, 1300, Verdict.VOID, Duty.RULE),
        (replace(DRAWN, round=2), 0, 1100, Verdict.MISSED, Duty.RULE),
        (replace(DRAWN, round=2), 0, 1099, Verdict.CLEAR, Duty.REVEAL),
        (replace(DRAWN, state=State.RULED), 0, 0, Verdict.CLEAR, Duty.ENFORCE),
        (replace(DRAWN, state=State.ENFORCED), 0, 0, Verdict.CLEAR, Duty.SETTLE),
        (replace(DRAWN, state=State.NONE), 0, 0, Verdict.MISSED, Duty.WAIT),
    ],
)
def test_what_is_due_follows_from_the_case_and_the_time(
    standing: Standing, block: int, now: int, said: Verdict, duty: Duty
) -> None:
    assert duty_in(standing, TIMES, block, now, said) is duty


def test_a_juror_that_knows_nothing_votes_in_the_last_quarter() -> None:
    assert not is_late(DRAWN, TIMES, 899)
    assert is_late(DRAWN, TIMES, 900)


def test_nodes_take_turns_at_what_anybody_may_do() -> None:
    found = {turns(CASE, samples.address(str(number)), [b"draw"]) for number in range(60)}
    assert found == set(range(TURNS))


def test_silence_is_seats_that_nothing_was_revealed_for() -> None:
    assert is_silent(3, Ballot(0, 0, 0, False))
    assert is_silent(3, Ballot(3, 0, 0, False))  # committed, not revealed
    assert not is_silent(3, Ballot(3, 0, Vote.ABSTAIN, False))
    assert is_silent(3, Ballot(2, 0, Vote.CLEAR, False))
    assert not is_silent(3, Ballot(0, 3, 0, False))
    assert not is_silent(0, Ballot(0, 0, 0, False))


def test_the_opposite_of_the_verdict_is_fined_and_nothing_else() -> None:
    fined = {(vote, verdict) for vote in Vote for verdict in Verdict if is_fined(vote, verdict)}
    assert fined == {
        (Vote.GUILTY, Verdict.CLEAR), (Vote.FAULT, Verdict.CLEAR), (Vote.CLEAR, Verdict.GUILTY),
        (Vote.CLEAR, Verdict.FAULT),
    }  # fmt: skip


def opening(name: str, block: int, transaction: bytes = b"t") -> Opening:
    digest = samples.digest(name)
    return Opening(digest, samples.address("a"), samples.address("b"), digest, digest, Wei(10**21), block, transaction)


def test_a_ballot_is_made_once_whoever_asks_again_and_whatever_is_stopped(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "jury.db")
    assert ledger.ballot(CASE, 0) is None
    sworn = ledger.swear(CASE, 0, [1, 5], Vote.GUILTY, samples.digest("roots"))
    again = ledger.swear(CASE, 0, [1, 2, 3], Vote.CLEAR, samples.digest("other"))
    ledger.close()
    ledger = Ledger(tmp_path / "jury.db")
    assert again == sworn == ledger.ballot(CASE, 0)
    assert (sworn.seats, sworn.vote, len(sworn.salt)) == ((1, 5), Vote.GUILTY, 32)
    juror = samples.address("juror")
    assert sworn.commitment(CASE, juror) == commitment(CASE, 0, juror, Vote.GUILTY, sworn.roots, sworn.salt)
    other = ledger.swear(CASE, 1, [7], Vote.GUILTY, samples.digest("roots"))
    assert other.salt != sworn.salt
    assert ledger.rounds(CASE) == [0, 1]
    ledger.close()


def test_cases_are_entered_once_and_follow_a_reorganisation(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "jury.db")
    assert ledger.seen == -1
    ledger.note([opening("x", 5), opening("y", 4)], 3)
    ledger.note([opening("x", 5)], 6)
    assert [one.id for one in ledger.open_cases()] == [samples.digest("y"), samples.digest("x")]
    assert ledger.open_cases()[1] == opening("x", 5)
    assert ledger.seen == 6
    ledger.close_case(samples.digest("x"))
    ledger.note([opening("x", 5)], 6)
    assert [one.id for one in ledger.open_cases()] == [samples.digest("y")]
    ledger.note([opening("x", 7, b"another")], 7)
    assert opening("x", 7, b"another") in ledger.open_cases()
    first = Finding(error=float("inf"), guilty=1.0)
    ledger.find(CASE, first)
    ledger.find(CASE, Finding("unable"))
    assert ledger.finding(CASE) == first
    ledger.close()


@pytest.mark.parametrize(
    "data",
    [b"", b"[", b'{"a": 1}', b"[1,2]", b'["ftp://x"]', b'["http://127.0.0.1:1","http://user@h"]',
     b'[ "http://127.0.0.1:1"]', b"[" + b'"http://127.0.0.1:1",' * 9, b"\xff" * 40, b"x" * (MAX_HINT_BYTES + 1)],
)  # fmt: skip
def test_what_follows_an_accusation_is_a_strangers(data: bytes) -> None:
    assert parse_sources(data) == []


def test_sources_travel_behind_an_accusation() -> None:
    sources = ["http://127.0.0.1:8080", "https://1.2.3.4:1"]
    assert parse_sources(encode_sources(sources)) == sources
    assert encode_sources([]) == b""
    for other in (["http://127.0.0.1:1"] * 5, ["nonsense"]):
        with pytest.raises(ConfigError):
            encode_sources(other)
