"""Going back: rows forgotten everywhere, or replaced by those of another session, in a new epoch (docs/sessions.md)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from tallystick.prefixes import Prefix
from tallystick.session.remote import Remote
from tallystick.session.repair import SETTLE_TIMEOUT_S
from tallystick_protocol.errors import TallystickError, Unreachable
from tallystick_protocol.frames import Frame, Kind
from tallystick_protocol.types import WINDOW

if TYPE_CHECKING:
    from tallystick.session.session import Session

COMPUTED_TIMEOUT_S = 60.0
FORK_REFUSALS = ("bad_position", "session_unknown", "rejected", "overloaded")
"""What a hop answers that cannot take over a session's rows, and can go on otherwise."""


class Rewinding:
    """Takes rows of one session back. is_going_on: receipts that come meanwhile wait."""

    def __init__(self, session: Session) -> None:
        self.is_going_on = False
        self._session = session

    async def crop(self, length: int) -> None:
        """Forget the rows from `length` on, everywhere; what was computed is due. Raises RolledBack, NoRoute."""
        session = self._session
        await self._settle_windows(length)
        computed = len(session.ids)
        async with self._rewinding(Frame(Kind.CROP, position=length), lambda remote: remote.crop(length, computed)):
            session.forget(length)

    async def drop(self, length: int) -> None:
        """Forget rows from `length` on that complete no window, as rejected drafts do, without waiting for anybody."""
        session = self._session
        computed = len(session.ids)
        is_signed = any(hop.standing.covered > length for hop in session.hops)
        if session.one_shot or is_signed or length // WINDOW != computed // WINDOW:
            await self.crop(length)
            return
        if length == computed:
            return
        session.epoch += 1
        session.forget(length)
        for remote in [*session.everybody(), *session.witnesses]:
            try:
                await remote.drop(session.epoch, length, computed if remote in session.hops else length)
            except Unreachable:
                continue  # `until` mends it

    async def fork_from(self, other: Session, shared: int) -> None:
        """Hold what `other` holds; both begin with the same `shared` rows. Nothing is computed where the hops are the
        same; else the rows are fed again. Raises RolledBack, NoRoute."""
        session = self._session
        held = other.holds
        await self._settle_windows(shared)
        if session.holds.hops != held.hops or session.sketching.is_on:
            await self.crop(shared)
        elif await self.take_over(held, shared, len(held.ids)):
            return
        await session.feed(list(held.ids[shared:]), held.want[shared:])

    async def take_over(self, held: Prefix, shared: int, length: int) -> bool:
        """Hold rows [shared, length) of what another session of these hops holds, open or not; both begin with the same
        `shared` rows. False, and only those are held, where a hop has them no more. Nothing is computed or due."""
        session = self._session
        frame = Frame(Kind.FORK, {"from": held.session, "to": length}, shared)
        computed = len(session.ids)
        refused: list[Remote] = []
        async with self._rewinding(frame, lambda remote: remote.fork(shared, length, computed), refused):
            for hop in refused:  # it is owed a crop in the fork's place: marks on push connections are counted
                await self._rewind_hop(hop, Frame(Kind.CROP, position=shared), lambda hop: hop.crop(shared, computed))
            session.forget(shared)
            if not refused:
                session.ids += held.ids[shared:length]
                session.want += held.want[shared:length]
                session.results.rows |= {at: row for at, row in held.results.items() if shared <= at < length}
        if refused:
            async with self._rewinding(Frame(Kind.CROP, position=shared), lambda remote: remote.crop(shared, shared)):
                pass  # those that did fork
        return not refused

    async def computed(self) -> None:
        """Wait until every hop has computed what was fed. Raises RolledBack, NoRoute."""
        session = self._session
        length = len(session.ids)
        if session.want and session.want[-1]:
            await session.result(length - 1)
            return
        await session.flush()
        await session.until(
            lambda: all(hop.standing.covered >= length for hop in session.hops), COMPUTED_TIMEOUT_S, "the rows"
        )

    async def _settle_windows(self, length: int) -> None:
        """Wait until every complete window before `length` is signed for: its rows stay.

        Where hops are audited, until all that was computed is signed, judged and paid: what is dropped was looked at.
        """
        session = self._session
        if session.has_audits:
            await session.finish()
            return
        complete = 0 if session.one_shot else length // WINDOW * WINDOW
        await session.until(
            lambda: all(hop.standing.covered >= complete for hop in session.hops), SETTLE_TIMEOUT_S, "receipts"
        )

    @asynccontextmanager
    async def _rewinding(
        self, frame: Frame, note: Callable[[Remote], None], refused: list[Remote] | None = None
    ) -> AsyncIterator[None]:
        """Give every hop and auditor the command that takes rows back; within, the session's own books follow.

        A hop that fails is repaired later; one that only cannot do it is put into `refused`, if that is given.
        Receipts that come meanwhile wait.
        """
        session = self._session
        await session.repair.call_off()
        self.is_going_on = True
        session.epoch += 1
        try:
            for audit in session.audits:
                await audit.pause()
            for hop in session.hops:
                await self._rewind_hop(hop, frame, note, refused)
            for audit in session.audits:
                try:
                    await audit.crop(frame.position)
                except TallystickError as error:
                    audit.remote.failure = audit.remote.failure or error
            yield
        finally:
            self.is_going_on = False
            for audit in session.audits:
                audit.start()
            session.wake()

    async def _rewind_hop(
        self, hop: Remote, frame: Frame, note: Callable[[Remote], None], refused: list[Remote] | None = None
    ) -> None:
        session = self._session

        def on_done() -> None:
            note(hop)
            session.books.pending[hop] = {}  # what it signed before

        try:
            hop.rewound(session.epoch, frame.position)
            await hop.command(replace(frame, body={**frame.body, "epoch": session.epoch}), on_done=on_done)
        except TallystickError as error:
            if refused is not None and error.code in FORK_REFUSALS:
                refused.append(hop)
                return
            hop.failure = hop.failure or error
