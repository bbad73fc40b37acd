"""Hops that have been replaced: closed beside the session, and paid for what they still sign if they leave in order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from tallystick.session.remote import Remote
from tallystick_protocol.errors import TallystickError
from tallystick_protocol.frames import Frame, Kind

if TYPE_CHECKING:
    from tallystick.session.session import Session

log = logging.getLogger(__name__)

FAREWELL_S = 5.0


class Farewells:
    """Those who are leaving one session. Nobody waits for them but `settle`."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._tasks: set[asyncio.Task[None]] = set()

    def part(self, hop: Remote, index: int) -> None:
        """Another node has taken the place of hop `index` in order."""
        self._start(self._part(hop, index, len(self._session.ids)))

    def drop(self, hop: Remote) -> None:
        """A hop was lost."""
        self._session.books.pending.pop(hop, None)
        self._session.books.note_payment(hop)
        self._start(hop.close())

    async def settle(self) -> None:
        """Wait until all are gone."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(task := asyncio.create_task(work))
        task.add_done_callback(self._tasks.discard)

    async def _part(self, hop: Remote, index: int, length: int) -> None:
        """Have it sign what it has, pay for that, and close when the voucher has arrived."""
        session = self._session
        try:
            await hop.command(Frame(Kind.CLOSE), FAREWELL_S)
            session.books.check_hop(index, hop)
            await hop.pay(hop.rows_due, session.setting.purse)
            await hop.command(Frame(Kind.CLOSE), FAREWELL_S)
        except TallystickError as error:
            log.info("%s was left without a farewell (%s)", hop.node, error)
        session.books.pending.pop(hop, None)
        session.books.note_payment(hop, length)
        await hop.close()
