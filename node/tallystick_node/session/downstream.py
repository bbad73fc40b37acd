"""Where a session's output rows go: over push connections to the next hop and to auditors, or to the client."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator

from tallystick_node.session.links import Dialler, Link
from tallystick_node.session.record import Record
from tallystick_protocol.errors import TallystickError, Unreachable
from tallystick_protocol.frames import DType, Frame, Kind, rows_frame, rows_per_frame
from tallystick_protocol.receipts import pack_flags
from tallystick_protocol.types import ZERO_ADDRESS, Address, Positions, SessionId

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 1.0


class Downstream:
    """The push connections of one session: one to the next hop, one for each session that rows were replayed to."""

    def __init__(
        self,
        dialler: Dialler,
        session: SessionId,
        attempt: int,
        following: Address,
        record: Record,
        tell: Callable[[TallystickError], Awaitable[None]],
    ) -> None:
        """following: the next hop's node, or the zero address at the end of a route. tell: the client what is lost."""
        self.node = following
        self._dialler = dialler
        self._session = session
        self._attempt = attempt
        self._record = record
        self._tell = tell
        self._link: Link | None = None
        self._side: dict[SessionId, Link] = {}
        self._readers: dict[int, asyncio.Task[None]] = {}

    @property
    def is_end(self) -> bool:
        """Whether no hop follows."""
        return self.node == ZERO_ADDRESS

    async def dial(self) -> Link | None:
        """A new connection to the next hop in place of the old one; None at the end. It is used once `join` took it."""
        if self._link is not None:
            old, self._link = self._link, None
            await self._end(old)
        return None if self.is_end else await self._dialler.dial(self.node, self._session, self._attempt)

    async def join(self, link: Link, sealed: dict[int, bytes]) -> None:
        """Send the next hop what it has not got: rows, and the receipts that stand."""
        self._link = link
        self._attend(link)
        if link.position < len(self._record):
            await self._send(link, Positions(link.position, len(self._record)))
        for window in sorted(sealed):
            await link.send(_receipt(sealed[window]))

    async def pass_on(self, positions: Positions) -> None:
        """Rows that have just been computed, to the next hop if it is connected."""
        if self._link is not None:
            await self._send(self._link, positions)

    async def pass_receipt(self, sealed: bytes) -> None:
        if self._link is not None:
            await self._link.send(_receipt(sealed))

    async def replay(self, positions: Positions, to: Address, session: SessionId, sealed: dict[int, bytes]) -> None:
        """Kept rows and the receipts over them to another session of the client's."""
        link = self._side.get(session)
        if link is None:
            link = self._side[session] = await self._dialler.dial(to, session, self._attempt)
            self._attend(link)
        await self._send(link, positions)
        for window in range(self._record.num_windows):
            at = self._record.window(window)
            if window in sealed and positions.first < at.last and at.first < positions.last:
                await link.send(_receipt(sealed[window]))

    async def mark_crop(self, position: int) -> None:
        """Tell everybody that rows are sent to, in the order of the rows."""
        for link in self._links():
            try:
                await link.send(Frame(Kind.CROP, position=position))
            except Unreachable:
                await self._lose(link)

    async def close(self) -> None:
        links, self._link, self._side = self._links(), None, {}
        for link in links:
            await self._end(link)

    def _links(self) -> list[Link]:
        return [link for link in (self._link, *self._side.values()) if link is not None]

    def _attend(self, link: Link) -> None:
        """Read a link as long as it lasts, and tell the client when the next hop's ends."""

        async def read() -> None:
            await link.ended()
            self._readers.pop(id(link), None)
            try:
                await self._lose(link)
            except Unreachable:
                log.debug("the client is gone, too")

        self._readers[id(link)] = asyncio.create_task(read())

    async def _lose(self, link: Link) -> None:
        """A link has ended. An auditor's is dialled anew by the next replay, and the client hears of its end itself."""
        is_next = link is self._link
        self._forget(link)
        if is_next:
            await self._tell(link.gone())

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
        try:
            for frame in step_frames(positions.first, outputs, want):
                await link.send(frame)
        except Unreachable:
            self._forget(link)  # the rows are kept; whoever takes its place gets them
            raise

    def _forget(self, link: Link) -> None:
        if link is self._link:
            self._link = None
        self._side = {session: other for session, other in self._side.items() if other is not link}


def step_frames(first: int, rows: list[bytes], want: list[bool]) -> Iterator[Frame]:
    """Consecutive rows from position `first`, in frames that hold what a frame may."""
    limit = rows_per_frame(len(rows[0])) if rows else 1
    for begin in range(0, len(rows), limit):
        body = {"want": pack_flags(want[begin : begin + limit]), "more": begin + limit < len(rows)}
        yield rows_frame(Kind.STEP, DType.F32, rows[begin : begin + limit], first + begin, body)


def result_frames(dtype: DType, first: int, rows: list[bytes], want: list[bool]) -> Iterator[Frame]:
    """The wanted ones of consecutive rows from position `first`: each frame's bitmap says which positions it holds."""
    wanted = [at for at, asked in enumerate(want) if asked]
    limit = rows_per_frame(len(rows[wanted[0]])) if wanted else 1
    for begin in range(0, len(wanted), limit):
        part = wanted[begin : begin + limit]
        flags = want[part[0] : part[-1] + 1]
        yield rows_frame(Kind.RESULT, dtype, [rows[at] for at in part], first + part[0], {"want": pack_flags(flags)})


def _receipt(sealed: bytes) -> Frame:
    return Frame(Kind.RECEIPT, {"receipt": sealed})
