"""An answer that several routes carry side by side; what it releases, all of them have computed alike.

To whoever decides tokens it is one session. Each route is a `Session` of its own, which mends its own failures: what
one of them loses or takes back disturbs neither the others nor the reader.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from tallystick.agreement.comparison import Comparison, Conflict, compare
from tallystick.agreement.settling import Sentence, settle
from tallystick.attribution import Attribution
from tallystick.routing.candidates import Candidate
from tallystick.routing.choice import apart, owners
from tallystick.session.proving import agreed
from tallystick.session.remote import Remote
from tallystick.session.repair import SETTLE_TIMEOUT_S, RolledBack
from tallystick.session.session import STEP_TIMEOUT_S, Session
from tallystick.session.setting import Setting
from tallystick.verdict import Accusation, Check, Verdict
from tallystick_protocol.errors import CorruptResult, NoRoute
from tallystick_protocol.types import WINDOW, Address, Positions, Span

log = logging.getLogger(__name__)


class Agreement:
    """Several open routes for one answer. Use as a `Session`: `open`, `feed` and `result`, `finish`; always `close`.

    Nothing that was released is ever taken back: `RolledBack` of a route is made good here.
    """

    has_audits = False

    def __init__(self, sessions: Sequence[Session], verdict: Verdict) -> None:
        """sessions: not open yet, over disjoint routes of one numeric class, with this verdict."""
        self.sessions = list(sessions)
        self.verdict = verdict
        self.ids: list[int] = []
        self.want: list[bool] = []
        self._compared = Comparison({})
        self._seen: tuple[Any, ...] = ()
        self._noted: dict[tuple[int, int], tuple[Positions, tuple[Address, ...]]] = {}
        for session in self.sessions:
            session.apart = partial(self._taken_by_others, session)
            session.clearance = partial(self._cleared, session)

    @property
    def setting(self) -> Setting:
        """The first route's; the others' differ in nothing but their own lists of nodes."""
        return self.sessions[0].setting

    @property
    def route(self) -> list[Candidate]:
        """The first route's nodes, first hop first."""
        return self.sessions[0].route

    @property
    def routes(self) -> list[list[Candidate]]:
        return [list(session.route) for session in self.sessions]

    @property
    def one_shot(self) -> bool:
        return self.sessions[0].one_shot

    @property
    def rewinds(self) -> bool:
        return all(session.rewinds for session in self.sessions)

    # -- what a session does

    async def open(self) -> None:
        """Open every route. Raises NoRoute…"""
        await self._all(lambda session: session.open([]))

    async def feed(self, ids: list[int], want: Sequence[bool] | None = None) -> None:
        """Append token ids to every route; `want` as for `Session.feed`."""
        flags = [i == len(ids) - 1 for i in range(len(ids))] if want is None else list(want)
        self.ids += ids
        self.want += flags
        await self._all(lambda session: session.feed(list(ids), flags))

    async def result(self, position: int) -> bytes:
        """The row that left the model at a position, the same in all routes. Raises NoRoute, Unreachable…"""
        while True:
            what = f"position {position}"
            await self._until(lambda session: position in session.results.rows, STEP_TIMEOUT_S, what)
            if await self._settle_conflict():
                continue
            rows = {session.results.rows[position] for session in self.sessions}
            if len(rows) == 1:
                return rows.pop()
            await self._have_signed(position + 1)
            if not await self._settle_conflict():
                raise CorruptResult(f"the routes differ at position {position}, and in nothing that they signed")

    async def drop(self, length: int) -> None:
        """Forget rows from `length` on, in every route."""
        del self.ids[length:], self.want[length:]
        await self._all(lambda session: session.drop(length))

    async def finish(self) -> None:
        """Have every row signed by every route, compared, and paid."""
        if not self.ids:
            return
        while True:
            await self._all(lambda session: session.flush())
            await self._until(lambda session: session.is_settled, SETTLE_TIMEOUT_S, "the receipts")
            if not await self._settle_conflict():
                return

    async def take_leave(self) -> None:
        await asyncio.gather(*(session.take_leave() for session in self.sessions))

    async def close(self) -> None:
        for session in self.sessions:
            await session.close()

    # -- the routes, one by one

    async def _all(self, work: Callable[[Session], Awaitable[None]]) -> None:
        """Do it in every route, and wait for all; then raise what the first one to fail has raised."""
        outcomes = await asyncio.gather(
            *(self._attend(session, work) for session in self.sessions), return_exceptions=True
        )
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _attend(self, session: Session, work: Callable[[Session], Awaitable[None]]) -> None:
        """Do it in one route; rows that it takes back are fed to it again."""
        while True:
            try:
                await work(session)
                return
            except RolledBack:
                await self._catch_up(session)
            except NoRoute as gap:
                raise NoRoute(
                    f"{gap.message} (with verify={self.verdict.policy!r} a node that shares no operator and no payee"
                    " with the other routes)",
                    **gap.fields,
                ) from None

    async def _catch_up(self, session: Session) -> None:
        if (at := len(session.ids)) < len(self.ids):
            await session.feed(self.ids[at:], self.want[at:])

    async def _until(self, done: Callable[[Session], bool], timeout_s: float, what: str) -> None:
        """Wait for something in every route, or for a conflict; each mends itself meanwhile."""

        async def wait(session: Session) -> None:
            await session.until(lambda: self._conflict() is not None or done(session), timeout_s, what)

        await self._all(wait)

    async def _have_signed(self, length: int) -> None:
        """Have every route sign what it has: the rows up to `length` at least."""
        await self._all(lambda session: session.flush())
        await self._until(
            lambda session: all(hop.standing.covered >= length for hop in session.hops), SETTLE_TIMEOUT_S, "receipts"
        )

    # -- owners

    def _taken_by_others(self, session: Session) -> set[Address]:
        """Nodes that may not work for a route: they have an owner in common with another one."""
        others = [other for other in self.sessions if other is not session]
        taken = owners(node for other in others for node in (*other.route, *other.repair.joining))
        known = session.setting.candidates
        return {c.node for c in known} - {c.node for c in apart(known, taken)}

    # -- comparing

    def _cleared(self, session: Session, index: int) -> int:
        """Windows of a hop that every route agrees on: those that are paid."""
        self._look()
        return self._compared.clears(session.hops[index].candidate.span)

    def _conflict(self) -> Conflict | None:
        self._look()
        return self._compared.conflict

    def _look(self) -> None:
        """Compare anew what was signed, if there is more of it, and have everybody see it."""
        seen = tuple(
            (
                hop.node,
                len(hop.standing.receipts),
                hop.standing.covered,
                hop.standing.previous(len(hop.standing.digests)),
            )
            for session in self.sessions
            for hop in session.hops
        )
        if seen == self._seen or any(len(session.hops) < len(session.route) for session in self.sessions):
            return
        self._seen = seen
        self._compared = compare(
            [[(hop.candidate.span, hop.standing.receipts) for hop in session.hops] for session in self.sessions]
        )
        self._note_checks()
        for session in self.sessions:
            session.wake()

    def _note_checks(self) -> None:
        """Put newly agreed windows into the verdict."""
        start = self.setting.stack.start
        for end, same in self._compared.agreed.items():
            ending = [next(hop for hop in session.hops if hop.candidate.span.end == end) for session in self.sessions]
            nodes = tuple(hop.node for hop in ending)
            for window in range(same):
                positions = ending[0].standing.receipts[window].positions
                if self._noted.get((end, window)) == (positions, nodes):
                    continue
                self._noted[end, window] = positions, nodes
                self._prove(window, ending)
                self.verdict.checks += [
                    Check(Span(start, end), positions, nodes[0], other, True, "routes") for other in nodes[1:]
                ]
            start = end

    def _prove(self, window: int, ending: Sequence[Remote]) -> None:
        """Hops of several routes have signed the same: their class counts."""
        first = ending[0].candidate
        for hop in ending[1:]:
            if hop.candidate.offer.numeric_class == first.offer.numeric_class:
                claim = hop.standing.receipts[window]
                agreed(self.sessions[0], claim, owners([first]), owners([hop.candidate]))

    async def _settle_conflict(self) -> bool:
        """Find out who is wrong, if the routes differ, and put others in their places; False when they do not."""
        conflict = self._conflict()
        if conflict is None:
            return False
        log.warning("the routes differ in window %d, layers %s", conflict.window, conflict.segment)
        sentences = await settle(self.sessions, conflict)
        for sentence in sentences:
            self._note(sentence)
        for sentence in sentences:
            await self._execute(sentence, conflict.window)
        return True

    def _note(self, sentence: Sentence) -> None:
        claim, verdict, witnesses = sentence.place.claim, self.verdict, sentence.witnesses
        for session in self.sessions:
            session.avoid.add(claim.node)
        other = witnesses[0] if witnesses else self._opposite(sentence)
        verdict.checks.append(
            Check(claim.span, claim.positions, claim.node, other, False if witnesses else None, "routes")
        )
        if witnesses:
            verdict.accusations.append(Accusation(claim.node, claim.span, claim.positions, witnesses))
        accused = claim.node if witnesses else None
        verdict.attributions.append(
            Attribution(sentence.cause, claim.span, "disagreement", (claim.node,), accused, witnesses, claim.positions)
        )

    def _opposite(self, sentence: Sentence) -> Address:
        """A hop of another route that ends where this one does, or at the next shared boundary."""
        end, own = sentence.place.hop.candidate.span.end, sentence.place.session
        other = next(session for session in self.sessions if session is not own)
        return next(hop.node for hop in other.hops if hop.candidate.span.end >= end)

    async def _execute(self, sentence: Sentence, window: int) -> None:
        place = sentence.place
        position = 0 if self.one_shot else window * WINDOW

        async def expel(session: Session) -> None:
            if place.hop in session.hops:  # else it was lost meanwhile
                await session.repair.expel(session.hops.index(place.hop), position)

        await self._attend(place.session, expel)
