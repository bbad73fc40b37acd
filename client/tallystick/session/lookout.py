"""Who is away and has nobody to stand in: others are looked out for meanwhile, and it is linked again when it is back.

A node keeps everything for a client whose connection was cut. So a hop whose place nobody could take keeps it while its
connection is dialled again; only when that fails, or another node turns up, is it replaced, and rows are computed anew.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from tallystick.session.ending import end
from tallystick.session.openings import LOOK_OUT_S
from tallystick.session.remote import Remote
from tallystick_protocol.errors import TallystickError, Unreachable

if TYPE_CHECKING:
    from tallystick.session.session import Session

log = logging.getLogger(__name__)

AWAY_S = 1.0
"""A connection that is back within this was hardly missed."""

RELINK_S = 5.0
"""Who cannot be reached by the hop before within this of being linked again is lost."""


class Lookout:
    """For the hops of one session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._since: dict[Remote, float] = {}
        self._asking: asyncio.Task[None] | None = None
        self._unlinked: set[Remote] = set()
        self._linked_at: dict[Remote, float] = {}

    def look(self) -> None:
        """Call now and then. Where a hop is away that nobody could replace, asks who else is there, beside the rest."""
        session, now = self._session, time.monotonic()
        away = {hop: index for index, hop in enumerate(session.hops) if hop.line.is_away and hop.failure is None}
        for index, hop in enumerate(session.hops):
            if hop in self._since and hop not in away and hop.failure is None:
                session.openings.filled(index)
        self._since = {hop: self._since.get(hop, now) for hop in away}
        lonely = [
            index
            for hop, index in away.items()
            if now - self._since[hop] > AWAY_S and not session.repair.has_stand_in(index)
        ]
        for index in lonely:
            session.openings.miss(index)
        if lonely and (self._asking is None or self._asking.done()):
            self._asking = asyncio.create_task(self._ask())

    async def close(self) -> None:
        await end(self._asking)

    async def _ask(self) -> None:
        try:
            await self._session.openings.look_out()
        except TallystickError as error:
            log.debug("looking out failed (%s)", error)
        await asyncio.sleep(LOOK_OUT_S)

    # -- links from hop to hop

    def keeps(self, index: int, told_by: Remote, error: TallystickError) -> bool:
        """Whether a hop that the one before cannot reach keeps its place for now; then `back` says when it is back."""
        session, hop = self._session, self._session.hops[index]
        if not index or told_by is not session.hops[index - 1] or not isinstance(error, Unreachable):
            return False
        if hop.failure is not None or session.repair.has_stand_in(index):
            return False
        if time.monotonic() - self._linked_at.get(hop, -RELINK_S) < RELINK_S:
            return False
        self._unlinked.add(hop)
        return True

    def back(self, index: int) -> bool:
        """Whether a hop is there that the one before has lost, and has to be told to dial again."""
        hop = self._session.hops[index]
        if hop not in self._unlinked or hop.line.is_away:
            return False
        self._unlinked.discard(hop)
        self._linked_at[hop] = time.monotonic()
        return True
