"""What a session still has to work on: rows from its client and from the hop before, and that hop's receipts.

Rows come in their order, receipts in theirs: rows may wait for a voucher that only a receipt behind them leads to.
Every item belongs to an epoch (docs/sessions.md). Of those of an earlier epoch than the session's, what was taken back
since is void; those of a later one wait until the session has heard from its client what leads there.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from tallystick_protocol.errors import BadFrame, ContextLengthExceeded, SessionUnknown
from tallystick_protocol.frames import Frame, Kind, take
from tallystick_protocol.peer import Channel

PUSHED_FRAMES, PUSHED_RECEIPTS = 8, 64
MAX_EPOCH = 1 << 31
KEPT_CROPS = 256
WHOLE = 1 << 62


@dataclass(slots=True)
class _Line:
    """Frames of one kind: with the push connection that brought them, None for the client's, and their epoch."""

    room: asyncio.Semaphore
    queue: asyncio.Queue[tuple[Channel | None, Frame, int]] = field(default_factory=asyncio.Queue)


class Inbox:
    """The queues of one session and the push connection that feeds them."""

    def __init__(self, max_rows: int, position: Callable[[], int], epoch: int) -> None:
        """max_rows: how many rows of the client may wait. position: rows that the session has computed."""
        self.epoch = epoch
        self._announced = epoch
        self._crops: deque[tuple[int, int]] = deque([(epoch, 0)], KEPT_CROPS)
        self._max_rows = max_rows
        self._position = position
        self._rows = _Line(asyncio.Semaphore(PUSHED_FRAMES))
        self._receipts = _Line(asyncio.Semaphore(PUSHED_RECEIPTS))
        self._queued_rows = 0
        self._push: Channel | None = None
        self._changed = asyncio.Event()
        self._taking: set[asyncio.Task[None]] = set()
        self._closed = False

    def announce(self, asked: int) -> int:
        """The epoch that a command of the client's leads to: the one that it names, or (0) the next one.

        The client's rows that come after it belong there. Raises BadFrame when it leads back.
        """
        epoch = asked or self._announced + 1
        if not self.epoch < epoch < MAX_EPOCH or epoch < self._announced:
            raise BadFrame(f"epoch {epoch} does not follow {self._announced}")
        self._announced = epoch
        return epoch

    def put(self, frame: Frame) -> None:
        """Rows from the client. Raises ContextLengthExceeded when more wait than the session was opened for."""
        if self._queued_rows + frame.num_rows > self._max_rows:
            raise ContextLengthExceeded("more rows are waiting than the session was opened for")
        self._queued_rows += frame.num_rows
        self._rows.queue.put_nowait((None, frame, self._announced))

    async def next(self) -> tuple[Channel | None, Frame, int]:
        """The next rows of which some are wanted, the push connection that they came on (None for the client's), and
        their epoch, which may be an earlier one."""
        while True:
            channel, frame, epoch = await self._next(self._rows)
            if frame.position < self.kept_of(epoch):
                return channel, frame, epoch

    async def next_receipt(self) -> tuple[Channel | None, Frame, int]:
        """The next receipt of the hop before, its connection and its epoch, which may be an earlier one."""
        return await self._next(self._receipts)

    def kept_of(self, epoch: int) -> int:
        """What of an epoch's rows was not taken back since: positions before this one."""
        if epoch < self._crops[0][0] - 1:
            return 0
        return min((position for later, position in self._crops if later > epoch), default=WHOLE)

    async def _next(self, line: _Line) -> tuple[Channel | None, Frame, int]:
        while True:
            channel, frame, epoch = await line.queue.get()
            while epoch > self.epoch and self._is_current(channel):
                self._changed.clear()
                await self._changed.wait()
            if channel is None:
                self._queued_rows -= frame.num_rows
            else:
                line.room.release()
            if self._is_current(channel):
                return channel, frame, epoch

    def is_push(self, channel: Channel | None) -> bool:
        """Whether a connection is the one on which the previous hop pushes."""
        return channel is not None and channel is self._push

    def drop_push(self) -> None:
        """The previous hop was replaced: what its connection brought no longer counts."""
        self._push = None
        self._changed.set()

    def enter(self, epoch: int, position: int) -> None:
        """Rows from `position` on that were sent in an earlier epoch are void."""
        self.epoch = epoch
        self._crops.append((epoch, position))
        self._changed.set()

    async def serve_push(self, channel: Channel, epoch: int) -> None:
        """Take rows and receipts from the previous hop until its connection ends or another one takes its place.

        epoch: the one that the previous hop is in.
        """
        self._push = channel
        self._changed.set()
        await channel.send(Frame(Kind.PUSH_OPENED, {"position": self._position(), "epoch": self.epoch}))
        if self._closed:
            raise SessionUnknown("the session has ended")
        taking = asyncio.create_task(self._take(channel, epoch))
        self._taking.add(taking)
        try:
            await asyncio.wait([taking])
        finally:
            self._taking.discard(taking)
            taking.cancel()
        if not taking.cancelled():
            await taking

    def close(self) -> None:
        self._push = None
        self._closed = True
        self._changed.set()
        for taking in self._taking:
            taking.cancel()

    def _is_current(self, channel: Channel | None) -> bool:
        return channel is None or channel is self._push

    async def _take(self, channel: Channel, epoch: int) -> None:
        while self._push is channel:
            frame = await channel.receive()
            if frame.kind not in (Kind.STEP, Kind.RECEIPT, Kind.CROP):
                raise BadFrame(f"{frame.kind.name} does not belong on a push connection")
            if frame.kind is Kind.CROP:
                marked = take(frame.body, "epoch", int)
                if not epoch < marked < MAX_EPOCH:
                    raise BadFrame(f"epoch {marked} does not follow {epoch}")
                epoch = marked
            else:
                line = self._receipts if frame.kind is Kind.RECEIPT else self._rows
                await line.room.acquire()  # the hop before waits, not our memory
                line.queue.put_nowait((channel, frame, epoch))
