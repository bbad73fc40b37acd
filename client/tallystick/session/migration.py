"""Filling a node with a session's rows while another one still serves them, so that the two can change places."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING

from tallystick.checks import check_input
from tallystick.routing.candidates import Candidate
from tallystick.session.auditing import send_kept
from tallystick.session.ending import end
from tallystick.session.remote import Hearing, Remote
from tallystick_protocol.errors import TallystickError, Unreachable
from tallystick_protocol.frames import Frame
from tallystick_protocol.receipts import Receipt

if TYPE_CHECKING:
    from tallystick.session.session import Session

log = logging.getLogger(__name__)

STEP_ROWS = 64
NEAR_ROWS = 8
POLL_S = 0.02
FILL_TIMEOUT_S = 60.0
"""Without any progress."""

KEPT_RESULTS = 64
"""Those of the last rows are enough: the hop that serves has answered the others."""


class Migration:
    """One candidate on its way to hop `index`. `task` ends when it has computed what the hop had, or cannot."""

    def __init__(self, session: Session, index: int, candidate: Candidate, why: str) -> None:
        self.index = index
        self.candidate = candidate
        self.why = why
        self.old = session.hops[index]
        self.fed = 0
        self._session = session
        self._pending: dict[int, Receipt] = {}
        self._changed = asyncio.Event()
        self._remote: Remote | None = None
        self._results: deque[Frame] = deque(maxlen=KEPT_RESULTS)
        session.attempt += 1
        self.task = asyncio.create_task(self._fill())
        self.task.add_done_callback(lambda _: session.wake())

    def result(self) -> Remote | None:
        """The filled node's session; None if it could not be filled. The caller closes it."""
        if self._remote is not None:
            self._session.witnesses.discard(self._remote)
        if self.task.exception() is None:
            return self._remote
        return None

    def forget(self, position: int) -> None:
        """Rows from `position` on were taken back."""
        self.fed = min(self.fed, position)

    def hand_over(self) -> None:
        """The node has taken the hop's place: what it answered while it was filled counts, if nobody else did."""
        assert self._remote is not None
        for frame in self._results:
            self._session.take_result(self._remote, frame)
        for window, receipt in self._pending.items():
            self._session.books.pending[self._remote][window] = receipt

    async def call_off(self) -> None:
        """Let the node go, paid for what it has signed."""
        await end(self.task)
        if self._remote is not None:
            self._session.witnesses.discard(self._remote)
            self._session.books.note_payment(self._remote)
            await self._remote.close()

    async def _fill(self) -> None:
        session, openings, reached = self._session, self._session.openings, 0
        try:
            async with asyncio.timeout(FILL_TIMEOUT_S) as stall:
                remote = await openings.connect(self.candidate, openings.opening(self.index, is_end=True))
                self._remote = remote
                session.witnesses.add(remote)
                remote.listen(
                    Hearing(
                        lambda _, receipt: self._pending.__setitem__(session.window_index(receipt), receipt),
                        lambda _, frame: self._results.append(frame),
                        self._changed.set,
                    )
                )
                while remote.line.pong.position < len(session.ids) - NEAR_ROWS or not self.fed:
                    if self.index and (lost := session.hops[self.index - 1].failure) is not None:
                        raise Unreachable("the hop before is lost", hop=session.hops[self.index - 1].node) from lost
                    await self._feed(remote)
                    if (position := remote.line.pong.position) > min(reached, self.fed - 1):
                        reached = position
                        stall.reschedule(asyncio.get_running_loop().time() + FILL_TIMEOUT_S)
                    await self._take_receipts(remote)
                    await remote.line.ping()
                    self._changed.clear()
                    try:
                        async with asyncio.timeout(POLL_S):
                            await self._changed.wait()
                    except TimeoutError:
                        await remote.line.look()
                    if remote.failure is not None:
                        raise remote.failure
        except TimeoutError:
            session.lost.add(self.candidate.node)
            raise Unreachable(f"{self.candidate.node} computed nothing more for {FILL_TIMEOUT_S:g} s") from None
        except TallystickError as error:
            log.info("%s could not be filled (%s)", self.candidate.node, error)
            if error.fields.get("hop") in (None, self.candidate.node):
                session.lost.add(self.candidate.node)
            raise

    async def _feed(self, remote: Remote) -> None:
        """The next rows, as far as the hop before has them."""
        session = self._session
        reach = len(session.ids)
        if self.index:
            before = session.hops[self.index - 1]
            await before.line.ping()
            reach = min(reach, before.line.pong.position)
        if self.fed < reach:
            last = min(self.fed + STEP_ROWS, reach)
            await send_kept(session, self.index, remote, self.fed, last)
            self.fed = last

    async def _take_receipts(self, remote: Remote) -> None:
        session = self._session
        while (receipt := self._pending.pop(len(remote.standing.receipts), None)) is not None:
            window = len(remote.standing.receipts)
            upstream = None
            if self.index:
                above = session.hops[self.index - 1].standing.receipts
                if len(above) <= window:
                    self._pending[window] = receipt
                    break
                upstream = above[window]
            session.books.check_receipt(remote, receipt, window)
            check_input(receipt, upstream, session.input_rows(receipt.first, receipt.last))
            remote.owe(receipt, window)
        await session.sketching.ask(remote)
        await remote.pay(session.sketching.payable(remote), session.setting.purse)
