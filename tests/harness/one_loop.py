"""An event loop whose clock runs as fast as its work, and channels between parties on it.

When nobody has anything to do, the time of the next timer has come: minutes of waiting take no time, and the same
program runs in the same order every time. What is sent to a thread runs at once.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from typing import Any

from tallystick_protocol.errors import Departed, TallystickError, Unreachable
from tallystick_protocol.frames import Frame
from tallystick_protocol.types import ZERO32


class _NoWaiting(selectors.DefaultSelector):
    """Nothing comes from outside but the loop's own wake-up calls, so waiting for it is passing time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        found = super().select(0)
        if not found:
            assert timeout is not None, "everybody waits for somebody else"
            self.now += max(timeout, 0.0)
        return found


class FastLoop(asyncio.SelectorEventLoop):
    """`time` begins at 0."""

    def __init__(self) -> None:
        self._clock = _NoWaiting()
        super().__init__(self._clock)
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._clock.now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:
            done.set_exception(error)
        return done


class End:
    """One end of a connection; satisfies `Channel`. `far` is the other end.

    hold(): whether what is under way waits for now. delay_s(): how long a message is under way.
    """

    far: End
    spki = ZERO32

    def __init__(self, hold: Callable[[], bool], delay_s: Callable[[], float]) -> None:
        self._hold, self._delay_s = hold, delay_s
        self._arrived: asyncio.Queue[Frame | TallystickError] = asyncio.Queue()
        self._underway: list[tuple[float, bytes | TallystickError]] = []
        self._timer: asyncio.Handle | None = None
        self.is_open = True

    def serves(self, is_served: bool) -> None:
        """Nobody loses a place here."""

    async def send(self, frame: Frame) -> None:
        if not self.is_open:
            raise Unreachable("this connection is closed")
        self.far._post(frame.encode())
        await asyncio.sleep(0)

    async def receive(self) -> Frame:
        if not self.is_open and self._arrived.empty():
            raise Unreachable("this connection is closed")
        found = await self._arrived.get()
        if isinstance(found, TallystickError):
            self._arrived.put_nowait(found)
            raise found
        return found

    async def close(self) -> None:
        """In order: the other side gets all that was sent before."""
        if self.is_open:
            self._shut(Unreachable("this connection is closed"))
            self.far._post(Departed("the other side has left"))

    def cut(self) -> None:
        """What is under way is lost, on both sides."""
        for end in (self, self.far):
            end._underway.clear()
            end._shut(Unreachable("the connection was cut"))

    def _shut(self, why: TallystickError) -> None:
        if self.is_open:
            self.is_open = False
            self._arrived.put_nowait(why)

    def _post(self, what: bytes | TallystickError) -> None:
        loop = asyncio.get_running_loop()
        last = self._underway[-1][0] if self._underway else 0.0
        self._underway.append((max(last, loop.time() + self._delay_s()), what))
        if self._timer is None:
            self._timer = loop.call_at(self._underway[0][0], self.deliver)

    def deliver(self) -> None:
        """What has had its time arrives, in its order, unless it is held."""
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._underway and not self._hold() and self._underway[0][0] <= loop.time() + 1e-9:
            _, what = self._underway.pop(0)
            if isinstance(what, bytes):
                if self.is_open:
                    self._arrived.put_nowait(Frame.decode(what))
            else:
                self._shut(what)
        if self._underway and not self._hold():
            self._timer = loop.call_at(self._underway[0][0], self.deliver)
