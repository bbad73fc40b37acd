"""What a session still has to work on: rows from its client, rows and receipts from the hop before, in their order.

A crop makes void what was sent before it. On the control connection that is everything queued so far; on a push
connection the previous hop marks the place, and marks are counted against our own crops.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tallystick_protocol.errors import BadFrame, ContextLengthExceeded, SessionUnknown
from tallystick_protocol.frames import Frame, Kind
from tallystick_protocol.peer import Channel

PUSHED_FRAMES = 8


class Inbox:
    """The queue of one session and the push connection that feeds it."""

    def __init__(self, control: Channel, max_rows: int, position: Callable[[], int]) -> None:
        """max_rows: how many rows of the client may wait. position: rows that the session has computed."""
        self.crops = 0
        self._control = control
        self._max_rows = max_rows
        self._position = position
        self._queue: asyncio.Queue[tuple[Channel, Frame, int]] = asyncio.Queue()
        self._queued_rows = 0
        self._room = asyncio.Semaphore(PUSHED_FRAMES)
        self._push: Channel | None = None
        self._marks = 0
        self._moved = asyncio.Condition()
        self._taking: set[asyncio.Task[None]] = set()
        self._closed = False

    def put(self, frame: Frame) -> None:
        """Rows from the client. Raises ContextLengthExceeded when more wait than the session was opened for."""
        if self._queued_rows + frame.num_rows > self._max_rows:
            raise ContextLengthExceeded("more rows are waiting than the session was opened for")
        self._queued_rows += frame.num_rows
        self._queue.put_nowait((self._control, frame, self.crops))

    async def next(self) -> tuple[Channel, Frame]:
        """The next frame that is not void, and the connection that it came on."""
        while True:
            channel, frame, crops = await self._queue.get()
            if channel is self._control:
                self._queued_rows -= frame.num_rows
            else:
                self._room.release()
            if crops == self.crops and (channel is self._control or channel is self._push):
                return channel, frame

    def is_push(self, channel: Channel) -> bool:
        """Whether a connection is the one on which the previous hop pushes."""
        return channel is self._push

    def drop_push(self) -> None:
        """The previous hop was replaced: what its connection brought no longer counts."""
        self._push = None

    async def cropped(self) -> None:
        """Everything that was sent before this moment is void."""
        async with self._moved:
            self.crops += 1
            self._moved.notify_all()

    async def serve_push(self, channel: Channel) -> None:
        """Take rows and receipts from the previous hop until its connection ends or another one takes its place."""
        self._push = channel
        self._marks = self.crops
        await channel.send(Frame(Kind.PUSH_OPENED, {"position": self._position()}))
        if self._closed:
            raise SessionUnknown("the session has ended")
        taking = asyncio.create_task(self._take(channel))
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
        for taking in self._taking:
            taking.cancel()

    async def _take(self, channel: Channel) -> None:
        while self._push is channel:
            frame = await channel.receive()
            if frame.kind not in (Kind.STEP, Kind.RECEIPT, Kind.CROP):
                raise BadFrame(f"{frame.kind.name} does not belong on a push connection")
            if frame.kind is Kind.CROP:
                async with self._moved:
                    self._marks += 1
                    await self._moved.wait_for(lambda: self.crops >= self._marks)
                continue
            if self._marks < self.crops:
                continue  # sent before the previous hop had heard of the crop
            await self._room.acquire()  # the hop before waits, not our memory
            self._queue.put_nowait((channel, frame, self.crops))
