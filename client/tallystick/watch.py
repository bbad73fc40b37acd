"""Who is late: looks at a session that waits, and fails the hop that holds it up."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from tallystick.patience import Patience
from tallystick.remote import Remote
from tallystick_protocol.errors import Unreachable

if TYPE_CHECKING:
    from tallystick.session import Session

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.25
STEP_FLOOR_S, STEP_PRIOR_S = 2.0, 30.0
DECODE_ROWS = 16


class Watch:
    """Measures what a step of this route usually takes. A hop is late when a step takes much longer than that, every
    hop before it has computed the rows, and it neither has nor waits for money."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._steps = Patience(STEP_FLOOR_S, STEP_PRIOR_S)
        self._fed: tuple[int, int, float] = (0, 0, 0.0)
        self._looked_at = 0.0
        self._reached: dict[Remote, int] = {}
        self._moved_at = time.monotonic()
        self._asked_at: float | None = None

    def fed(self, first: int, last: int) -> None:
        """Rows were fed."""
        self._fed = (first, last, time.monotonic())
        self._moved()

    def answered(self, position: int) -> None:
        """A result has come."""
        first, last, at = self._fed
        if position == last - 1 and last - first <= DECODE_ROWS:
            self._steps.note(time.monotonic() - at)
        self._moved()

    def _moved(self) -> None:
        self._moved_at = time.monotonic()
        self._asked_at = None

    async def look(self) -> None:
        """Ask for signs of life; fail whoever gives none, and the hop that is late."""
        session, now = self._session, time.monotonic()
        if now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        for remote in session.everybody():
            await remote.line.look()
        if session.one_shot or not session.ids:
            return
        self._note_progress()
        first, last, _ = self._fed
        limit_s = self._steps.limit_s if last - first <= DECODE_ROWS else max(STEP_PRIOR_S, self._steps.limit_s)
        if now - self._moved_at > limit_s:
            await self._look_closely(limit_s)

    def _note_progress(self) -> None:
        """Whoever has computed more rows than he had said before moves."""
        reached = {hop: hop.line.pong.position for hop in self._session.hops}
        if any(position > self._reached.get(hop, 0) for hop, position in reached.items()):
            self._moved()
        self._reached = reached

    async def _look_closely(self, limit_s: float) -> None:
        hops, asked_at = self._session.hops, self._asked_at
        if asked_at is None:
            self._asked_at = time.monotonic()
            for hop in hops:
                if hop.failure is None:
                    await hop.line.ping()
            return
        if any(hop.failure is not None or hop.line.pong.at < asked_at for hop in hops):
            return  # its line says when that has taken too long
        length = len(self._session.ids)
        if self._session.first_missing() == length:
            self._moved()  # nothing is waited for but receipts
            return
        late = next((hop for hop in hops if hop.line.pong.position < length), hops[-1])
        if late.line.pong.unpaid or not self._session.repair.has_stand_in(hops.index(late)):
            self._moved()
            return
        log.info("%s is late: nothing has moved for %.1f s", late.node, limit_s)
        late.failure = Unreachable(f"{late.node} made no progress for {limit_s:.1f} s", hop=late.node)
