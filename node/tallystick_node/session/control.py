"""The client's side of a session: a connection that may be lost and replaced by another one within the lease.

What could not be sent meanwhile is not kept here: on RESUME the session sends again what the client says it lacks.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence

from tallystick_protocol.errors import Departed, ProtocolError, SessionUnknown, TallystickError, Unreachable
from tallystick_protocol.frames import Frame, Kind
from tallystick_protocol.peer import Channel, error_frame

OUTCOMES = 64
WAITING_FRAMES = 16


class Control:
    """A channel to the client, over one connection after the other."""

    def __init__(self, lease_s: float) -> None:
        """lease_s: how long the session waits for its client when the connection is lost."""
        self._lease_s = lease_s
        self._channel: Channel | None = None
        self._arrived: asyncio.Queue[Frame | TallystickError] = asyncio.Queue()
        self._room = asyncio.Semaphore(WAITING_FRAMES)
        self._attached = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None
        self._lease: asyncio.TimerHandle | None = None
        self._ended = False

    @property
    def is_attached(self) -> bool:
        return self._channel is not None

    async def attach(self, channel: Channel, hello: Sequence[Frame] = ()) -> asyncio.Task[None]:
        """Take the client's frames from this connection, from now on, instead of another one.

        hello: sent before anything else. The task that is returned ends when the connection, or its turn, has ended.
        Raises SessionUnknown when it is too late, Unreachable.
        """
        for frame in hello:
            await channel.send(frame)
        if self._ended:
            raise SessionUnknown("the session has ended")
        self.drop()
        if self._lease is not None:
            self._lease.cancel()
        self._channel = channel
        self._attached.set()
        self._pump = asyncio.create_task(self._take(channel))
        return self._pump

    async def send(self, frame: Frame) -> None:
        """Lost if the client is away: it asks for what it lacks when it comes back."""
        channel = self._channel
        if channel is None:
            return
        try:
            await channel.send(frame)
        except Unreachable:
            self._detach(channel)

    async def receive(self) -> Frame:
        """The client's next frame. Raises Unreachable when it has left or its lease is over, BadFrame for nonsense."""
        found = await self._arrived.get()
        if isinstance(found, TallystickError):
            raise found
        self._room.release()
        return found

    async def wait_attached(self) -> None:
        """Return when the client is there: without it nothing is computed."""
        await self._attached.wait()

    def drop(self) -> None:
        """Let go of the connection; the lease begins."""
        if self._channel is not None:
            self._detach(self._channel)

    def expel(self, error: TallystickError) -> None:
        """Have `receive` raise this."""
        self._arrived.put_nowait(error)

    def end(self) -> None:
        """The session has ended."""
        self._ended = True
        self.drop()
        if self._lease is not None:
            self._lease.cancel()

    async def _take(self, channel: Channel) -> None:
        try:
            while True:
                frame = await channel.receive()
                await self._room.acquire()
                self._arrived.put_nowait(frame)
        except (Departed, ProtocolError) as error:
            if channel is self._channel:
                self._arrived.put_nowait(error)
        except Unreachable:
            self._detach(channel)

    def _detach(self, channel: Channel) -> None:
        if self._channel is not channel:
            return
        self._channel = None
        self._attached.clear()
        if self._pump is not None:
            self._pump.cancel()
            self._pump = None
        gone = Unreachable(f"the client was away for {self._lease_s:g} s")
        self._lease = asyncio.get_running_loop().call_later(self._lease_s, self._arrived.put_nowait, gone)


class Commands:
    """The client's numbered commands, in their order; each is done once, whatever connection it came on."""

    def __init__(self, control: Control, limit: int) -> None:
        self._control = control
        self._queue: asyncio.Queue[Frame] = asyncio.Queue(limit)
        self._received = 0
        self._outcomes: OrderedDict[int, Frame] = OrderedDict()

    async def is_fresh(self, frame: Frame) -> bool:
        """Whether a command was not taken before; if it was, its outcome is told again once there is one."""
        number = command_number(frame)
        if not number or number > self._received:
            return True
        if (outcome := self._outcomes.get(number)) is not None:
            await self._control.send(outcome)
        return False

    async def put(self, frame: Frame) -> None:
        """Take a fresh command up."""
        self._received = max(self._received, command_number(frame))
        await self._queue.put(frame)

    async def next(self) -> Frame:
        return await self._queue.get()

    async def done(self, frame: Frame) -> None:
        """Answer DONE."""
        if number := command_number(frame):
            await self._settle(number, Frame(Kind.DONE, {"of": number}))

    async def failed(self, frame: Frame, error: TallystickError, at: int) -> None:
        """Answer ERROR; `at`: the session's position."""
        number = command_number(frame)
        await self._settle(number, told(error, at, number))

    async def _settle(self, number: int, outcome: Frame) -> None:
        if number:
            self._outcomes[number] = outcome
            if len(self._outcomes) > OUTCOMES:
                self._outcomes.popitem(last=False)
        await self._control.send(outcome)


def told(error: TallystickError, at: int, of: int = 0) -> Frame:
    """An ERROR frame within a session. at: the session's position. of: the command that failed, 0 for none."""
    return error_frame(error.code, error.message, {**error.fields, "at": at, **({"of": of} if of else {})})


def command_number(frame: Frame) -> int:
    """The number of a command whose end the client wants to hear of; 0 for none."""
    number = frame.body.get("id", 0)
    return number if type(number) is int and 0 <= number < 1 << 31 else 0
