"""Now and then: do the nodes of a session still stake for its model? Whose stake leaves is moved away from."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from tallystick.session.ending import end
from tallystick_protocol.errors import TallystickError
from tallystick_protocol.types import Address

if TYPE_CHECKING:
    from tallystick.session.session import Session

log = logging.getLogger(__name__)

STAKES_S = 60.0
"""Between two looks. What was signed by then is answered for by the stake that leaves (docs/contracts.md)."""


class Stakes:
    """gone: the nodes whose stake has left, or is about to, since the route was planned, and what the chain says."""

    def __init__(self, session: Session) -> None:
        self.gone: dict[Address, str] = {}
        self._session = session
        self._looked_at = time.monotonic()
        self._task: asyncio.Task[None] | None = None

    def look(self) -> None:
        """Begin to look, if it is time; nothing waits for the chain."""
        now = time.monotonic()
        if now - self._looked_at >= STAKES_S and (self._task is None or self._task.done()):
            self._looked_at = now
            self._task = asyncio.create_task(self._ask())

    async def close(self) -> None:
        await end(self._task)

    async def _ask(self) -> None:
        """Of one whose stake is gone another node takes the place, as if it stopped; while there is none, it goes on.

        Then all others are asked about, too: who takes a place should not be the next one to leave.
        """
        session = self._session
        unstaked = session.setting.unstaked
        taking_part = {remote.node for remote in session.everybody()} - self.gone.keys()
        try:
            found = await unstaked(taking_part)
            if found:
                others = {c.node for c in session.setting.candidates} - taking_part - self.gone.keys()
                self.gone |= found | await unstaked(others)
        except TallystickError as error:
            log.info("stakes cannot be looked at for now: %s", error)
            return
        for remote in session.everybody():
            if remote.node in found:
                log.warning("%s is moved away from: %s", remote.node, found[remote.node])
                remote.is_draining = True
                session.wake()
