"""Where a session's output rows go: over push connections to the next hop and to auditors, or to the client."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator

from tallystick_node.session.links import Dialler, Link, gone
from tallystick_node.session.record import Record
from tallystick_protocol.errors import TallystickError, Unreachable
from tallystick_protocol.frames import DType, Frame, Kind, rows_frame, rows_per_frame
from tallystick_protocol.receipts import pack_flags
from tallystick_protocol.types import ZERO_ADDRESS, Address, Positions, SessionId

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 1.0
REDIAL_AFTER_S = (0.0, 0.1, 0.4)
KEPT_CROPS = 256


class Downstream:
    """The push connections of one session: one to the next hop, one for each session that rows were replayed to."""

    def __init__(
        self,
        dialler: Dialler,
        session: SessionId,
        attempt: int,
        following: Address,
        record: Record,
        dtype: DType,
        epoch: int,
        tell: Callable[[TallystickError], Awaitable[None]],
        reconnect: Callable[[], Awaitable[None]],
    ) -> None:
        """following: the next hop's node, or the zero address at the end of a route. tell: the client what is lost.

        dtype: of rows on the wire.

        reconnect: dials and joins again, when the link to the next hop has ended by itself.
        """
        self.node = following
        self._epoch = epoch
        self._crops: list[tuple[int, int]] = []
        self._reconnect = reconnect
        self._redialling: asyncio.Task[None] | None = None
        self._dialler = dialler
        self._session = session
        self._attempt = attempt
        self._record = record
        self._dtype = dtype
        self._tell = tell
        self._link: Link | None = None
        self._side: dict[SessionId, Link] = {}
        self._readers: dict[int, asyncio.Task[None]] = {}

    @property
    def is_end(self) -> bool:
        """Whether no hop follows."""
        return self.node == ZERO_ADDRESS

    def redirect(self, node: Address) -> None:
        """Another node follows: whatever was tried with the one before is over."""
        self.node = node
        if self._redialling is not None:
            self._redialling.cancel()

    async def dial(self) -> Link | None:
        """A new connection to the next hop in place of the old one; None at the end. It is used once `join` took it."""
        if (filled := self._side.pop(self._session, None)) is not None:  # it got rows before it took its place
            await self._end(filled)
        if self._link is not None:
            old, self._link = self._link, None
            await self._end(old)
        return None if self.is_end else await self._open(self.node, self._session)

    async def join(self, link: Link, sealed: dict[int, bytes]) -> None:
        """Send the next hop the receipts that stand, which lead to its vouchers, and the rows that it has not got."""
        self._link = link
        self._attend(link)
        if link.ours < self._epoch:  # rows were taken back since it was dialled
            await self._give(link, Frame(Kind.CROP, {"epoch": self._epoch}))
        for window in sorted(sealed):
            await self._give(link, _receipt(sealed[window]))
        start = self._start(link)
        if start < len(self._record):
            await self._send(link, Positions(start, len(self._record)))

    def _start(self, link: Link) -> int:
        """The first row that a hop lacks: what it holds of an earlier epoch it may have to forget."""
        if link.theirs >= self._epoch:
            return link.position
        missed = [position for epoch, position in self._crops if epoch > link.theirs]
        oldest = self._crops[0][0] if self._crops else self._epoch
        return min(link.position, *missed) if missed and oldest <= link.theirs + 1 else 0

    async def pass_on(self, positions: Positions) -> None:
        """Rows that have just been computed, to the next hop if it is connected."""
        if self._link is not None:
            await self._send(self._link, positions)

    async def pass_receipt(self, sealed: bytes) -> None:
        if self._link is not None:
            await self._give(self._link, _receipt(sealed))

    async def replay(self, positions: Positions, to: Address, session: SessionId, sealed: dict[int, bytes]) -> None:
        """Kept rows, after the receipts over them, to another session of the client's, or another hop of this one."""
        link = self._side.get(session)
        if link is None or link.node != to:
            link = self._side[session] = await self._open(to, session)
            self._attend(link)
        for window in range(self._record.num_windows):
            at = self._record.window(window)
            if window in sealed and positions.first < at.last and at.first < positions.last:
                await self._give(link, _receipt(sealed[window]))
        await self._send(link, positions)
        if self._side.get(session) is not link:
            raise gone(link.node)

    async def enter(self, epoch: int, position: int) -> None:
        """Rows from `position` on are taken back: tell everybody that rows are sent to, in the order of the rows."""
        self._epoch = epoch
        self._crops = [*self._crops[-KEPT_CROPS:], (epoch, position)]
        for link in self._links():
            await self._give(link, Frame(Kind.CROP, {"epoch": epoch}, position))

    async def close(self) -> None:
        if self._redialling is not None:
            self._redialling.cancel()
            await asyncio.gather(self._redialling, return_exceptions=True)
        links, self._link, self._side = self._links(), None, {}
        for link in links:
            await self._end(link)

    def _links(self) -> list[Link]:
        return [link for link in (self._link, *self._side.values()) if link is not None]

    async def _open(self, node: Address, session: SessionId) -> Link:
        return await self._dialler.dial(node, session, self._attempt, self._epoch)

    def _attend(self, link: Link) -> None:
        """Read a link as long as it lasts."""

        async def read() -> None:
            await link.ended()
            self._readers.pop(id(link), None)
            self._lose(link)

        self._readers[id(link)] = asyncio.create_task(read())

    def _lose(self, link: Link) -> None:
        """A link has ended. An auditor's is dialled anew by the next replay, and the client hears of its end itself;
        the next hop's is dialled again at once, and the client hears of it when that fails."""
        is_next = link is self._link
        self._forget(link)
        if is_next:
            self.keep_linked()

    def keep_linked(self) -> None:
        """Dial the next hop if there is no connection to it; tell the client when that fails."""
        if not self.is_end and self._link is None and (self._redialling is None or self._redialling.done()):
            self._redialling = asyncio.create_task(self._dial_often(self.node))

    async def _dial_often(self, node: Address) -> None:
        for pause in REDIAL_AFTER_S:
            await asyncio.sleep(pause)
            if self._link is not None or self.node != node:
                return  # somebody else has mended it
            try:
                await self._reconnect()
                if self._link is not None:  # else that one was lost, too
                    return
            except TallystickError as error:
                log.debug("dialling %s failed (%s)", node, error)
        if self._link is None and self.node == node:
            await self._tell(gone(node))

    async def _end(self, link: Link) -> None:
        """Close a link."""
        reader = self._readers.pop(id(link), None)
        if reader is not None:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await link.channel.close()
        except (TimeoutError, Unreachable):
            log.debug("a push connection did not close in time")

    async def _send(self, link: Link, positions: Positions) -> None:
        outputs, want = self._record.outputs(positions)
        for frame in step_frames(self._dtype, positions.first, outputs, want):
            await self._give(link, frame)

    async def _give(self, link: Link, frame: Frame) -> None:
        """Send a frame; if the link has ended it is lost: the rows are kept, and whoever takes its place gets them."""
        try:
            await link.send(frame)
        except Unreachable:
            self._lose(link)

    def _forget(self, link: Link) -> None:
        if link is self._link:
            self._link = None
        self._side = {session: other for session, other in self._side.items() if other is not link}


def step_frames(dtype: DType, first: int, rows: list[bytes], want: list[bool]) -> Iterator[Frame]:
    """Consecutive rows from position `first`, in frames that hold what a frame may."""
    limit = rows_per_frame(len(rows[0])) if rows else 1
    for begin in range(0, len(rows), limit):
        body = {"want": pack_flags(want[begin : begin + limit]), "more": begin + limit < len(rows)}
        yield rows_frame(Kind.STEP, dtype, rows[begin : begin + limit], first + begin, body)


def result_frames(dtype: DType, first: int, rows: list[bytes], want: list[bool], epoch: int) -> Iterator[Frame]:
    """The wanted ones of consecutive rows from position `first`: each frame's bitmap says which positions it holds."""
    wanted = [at for at, asked in enumerate(want) if asked]
    limit = rows_per_frame(len(rows[wanted[0]])) if wanted else 1
    for begin in range(0, len(wanted), limit):
        part = wanted[begin : begin + limit]
        body = {"want": pack_flags(want[part[0] : part[-1] + 1]), "epoch": epoch}
        yield rows_frame(Kind.RESULT, dtype, [rows[at] for at in part], first + part[0], body)


def _receipt(sealed: bytes) -> Frame:
    return Frame(Kind.RECEIPT, {"receipt": sealed})
