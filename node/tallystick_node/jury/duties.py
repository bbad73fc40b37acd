"""What is due in a case, as pure functions of how it stands and what time it is."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from tallystick_protocol.chain.court import State, Verdict
from tallystick_protocol.chain.docket import LAST_ROUND, Standing, Times
from tallystick_protocol.signing import address_bytes, keccak
from tallystick_protocol.types import Address, Digest

LATE = 4
"""A juror that knows nothing better by the last quarter of the commitments' time votes unreadable or abstains."""

TURNS = 8


class Duty(Enum):
    """WAIT: nothing. The others are calls of the Court; VOTE and REVEAL are for who has seats, APPEAL is for who knows
    better, the rest for anybody."""

    WAIT = "wait"
    DRAW = "draw"
    RETARGET = "retarget"
    VOTE = "vote"
    REVEAL = "reveal"
    REDRAW = "redraw"
    APPEAL = "appeal"
    RULE = "rule"
    ENFORCE = "enforce"
    SETTLE = "settle"


def duty_in(standing: Standing, times: Times, block: int, now: int, said: Verdict) -> Duty:
    """block, now: the newest block's number and time. said: what the current round's votes say."""
    if standing.state is State.OPEN:
        if block <= standing.seed_block:
            return Duty.WAIT
        return Duty.DRAW if block <= standing.seed_block + times.headers else Duty.RETARGET
    if standing.state is State.RULED:
        return Duty.ENFORCE
    if standing.state is State.ENFORCED:
        return Duty.SETTLE
    if standing.state is not State.DRAWN:
        return Duty.WAIT
    reveal_end = standing.commit_end + times.reveal
    if now < standing.commit_end:
        return Duty.VOTE
    if now < reveal_end:
        return Duty.REVEAL
    last = standing.round == LAST_ROUND
    if said is Verdict.MISSED and not last:
        return Duty.REDRAW
    return Duty.RULE if now >= reveal_end + (0 if last else times.appeal) else Duty.APPEAL


def is_late(standing: Standing, times: Times, now: int) -> bool:
    """Whether a vote can wait no longer for what it is about."""
    return now >= standing.commit_end - times.commit // LATE


def turns(case: Digest, node: Address, what: Sequence[bytes] = ()) -> int:
    """How many turns a node waits before it does what anybody may, so that not all send it, and pay gas, at once."""
    return keccak(case + address_bytes(node) + b"".join(what))[0] % TURNS
