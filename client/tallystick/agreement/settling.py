"""Routes have signed different outputs: who computed wrongly, by what they signed and by others who compute it again.

Each hop between the last boundary where the routes agreed and the one where they do not is put to a vote: of hops of
other routes that did the same work, and of nodes of yet other owners until two agree and nobody else is as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tallystick.agreement.comparison import Conflict
from tallystick.attribution import Cause
from tallystick.routing.choice import apart, owners
from tallystick.session.ballot import Ballot
from tallystick.session.remote import Remote
from tallystick.session.session import Session
from tallystick.session.voting import hear, vote
from tallystick_protocol.receipts import Receipt
from tallystick_protocol.types import Address, Span


@dataclass(frozen=True, slots=True)
class Place:
    """A hop of one of the routes, and its receipt for the window in question."""

    session: Session
    index: int
    hop: Remote
    claim: Receipt


@dataclass(frozen=True, slots=True)
class Sentence:
    """A hop that is to be replaced from the window on. witnesses: those that contradict it, alike; else nobody could
    say who is right, and it is only avoided."""

    place: Place
    witnesses: tuple[Address, ...]

    @property
    def cause(self) -> Cause:
        return "fraud" if self.witnesses else "numerics"


async def settle(sessions: Sequence[Session], conflict: Conflict) -> list[Sentence]:
    """Who is to be replaced for a conflict, at least one hop where it still stands."""
    places = _places(sessions, conflict)
    sentences: list[Sentence] = []
    for group in _same_work(places):
        sentences += await _judge(group)
    if not sentences and places:  # each has somebody who says the same, and yet they differ: all of them are in doubt
        sentences = [Sentence(place, ()) for place in places]
    return sentences


def _places(sessions: Sequence[Session], conflict: Conflict) -> list[Place]:
    found = []
    for session in sessions:
        for index, hop in enumerate(session.hops):
            span, receipts = hop.candidate.span, hop.standing.receipts
            inside = conflict.segment.start <= span.start and span.end <= conflict.segment.end
            if inside and conflict.window < len(receipts):
                found.append(Place(session, index, hop, receipts[conflict.window]))
    return found


def _same_work(places: Sequence[Place]) -> list[list[Place]]:
    """Places by what they claim to have worked on, in the order of layers."""
    groups: dict[tuple[Span, bytes], list[Place]] = {}
    for place in sorted(places, key=lambda place: place.hop.candidate.span):
        groups.setdefault((place.hop.candidate.span, place.claim.input), []).append(place)
    return list(groups.values())


async def _judge(group: Sequence[Place]) -> list[Sentence]:
    """The places of one group that are wrong, or that nobody can judge."""
    ballot = Ballot()
    for place in group:
        ballot.cast(place.claim)
    if ballot.won is None:
        await _hear_others(group, ballot)
    if ballot.won is None:
        await _compute(group, ballot)
    right = ballot.won
    if right is None:
        return [Sentence(place, ()) for place in group]
    return [Sentence(place, tuple(ballot.votes[right])) for place in group if place.claim.output != right]


async def _hear_others(group: Sequence[Place], ballot: Ballot) -> None:
    """Have nodes of other owners compute it, one after the other, until the ballot is won or nobody is left.

    Rows come from the hop before, of whichever route: all of them agreed on these.
    """
    heard = {place.hop.node for place in group}
    taken: set[Address] = set()
    for place in group:
        for candidate in place.session.openings.draw_auditors(place.index, heard):
            if not apart([candidate], taken):
                continue
            error = await hear(place.session, place.index, candidate, place.claim, ballot)
            if error and place.index and error.fields.get("hop") == place.session.hops[place.index - 1].node:
                break  # it does not give its rows: another route's hop may
            heard.add(candidate.node)
            if error is None:
                taken |= owners([candidate])
            if ballot.won is not None:
                return


async def _compute(group: Sequence[Place], ballot: Ballot) -> None:
    """Vote as the client itself, on rows that the hop before has kept, of whichever route."""
    for place in group:
        if await vote(place.session, place.index, place.claim, ballot):
            return
