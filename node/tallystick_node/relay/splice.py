"""Copying between two sockets, both ways, as fast as the slower one reads and only as far as somebody pays."""

from __future__ import annotations

import asyncio
import socket
from typing import Protocol

IDLE_S = 120.0
LINGER_S = 30.0
"""After one side has ended, the other one may go on for so long."""

HIGH_WATER = 256 * 1024
"""Bytes that wait for a socket before the other one is read no further."""


class Meter(Protocol):
    """Who counts what is copied."""

    def count(self, num_bytes: int) -> bool:
        """Add bytes that are about to be written; False when they have to wait for `allowed`."""

    async def allowed(self) -> None:
        """Return when the bytes may be written. Raises TallystickError when they may not."""


async def splice(one: socket.socket, other: socket.socket, meter: Meter, idle_s: float = IDLE_S) -> None:
    """Copy until both sides have ended, one has failed, nothing moves for `idle_s`, or the meter refuses.

    Closes both sockets, which must not block. Raises what the meter raises.
    """
    joint, loop = _Joint(meter, idle_s), asyncio.get_running_loop()
    left, right = _End(joint), _End(joint)
    left.other, right.other = right, left
    try:
        await loop.connect_accepted_socket(lambda: left, one)
        await loop.connect_accepted_socket(lambda: right, other)
        joint.begin(left, right)
        await joint.done
    finally:
        joint.end()
        one.close()
        other.close()


class _Joint:
    """What both ends share: the meter, the time of the last byte, and the end of it all."""

    def __init__(self, meter: Meter, idle_s: float) -> None:
        self.meter = meter
        self.limit_s = idle_s
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = self.loop.create_future()
        self.moved_at = self.loop.time()
        self.waiting: set[asyncio.Task[None]] = set()
        self._ends: tuple[_End, ...] = ()
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, *ends: _End) -> None:
        self._ends = ends
        for end in ends:
            end.begin()
        self._watch()

    def finish(self, error: BaseException | None = None) -> None:
        if not self.done.done():
            if error is None:
                self.done.set_result(None)
            else:
                self.done.set_exception(error)

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for task in self.waiting:
            task.cancel()
        for end in self._ends:
            if end.transport is not None:
                end.transport.abort()

    def has_ended(self) -> None:
        """One side sends no more."""
        self.limit_s = min(self.limit_s, LINGER_S)
        self.moved_at = self.loop.time()
        if all(end.has_ended for end in self._ends):
            for end in self._ends:
                if end.transport is not None:
                    end.transport.close()

    def _watch(self) -> None:
        left_s = self.moved_at + self.limit_s - self.loop.time()
        if left_s <= 0:
            self.finish()
        else:
            self._timer = self.loop.call_later(min(left_s, LINGER_S), self._watch)


class _End(asyncio.Protocol):
    """One of two sockets: what it receives is written to the other one."""

    other: _End

    def __init__(self, joint: _Joint) -> None:
        self._joint = joint
        self._pauses = 0
        self._early: list[bytes] | None = []
        self._held: list[bytes] = []
        self.transport: asyncio.Transport | None = None
        self.has_ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.transport.set_write_buffer_limits(HIGH_WATER)  # type: ignore[union-attr]

    def begin(self) -> None:
        """Both ends are there: pass on what has come already."""
        early, self._early = self._early or [], None
        for data in early:
            self.data_received(data)
        if self.has_ended:
            self._pass_end()

    def data_received(self, data: bytes) -> None:
        joint = self._joint
        joint.moved_at = joint.loop.time()
        if self._early is not None:
            self._early.append(data)
        elif self._held:
            joint.meter.count(len(data))
            self._held.append(data)
        elif joint.meter.count(len(data)):
            self._pass(data)
        else:
            self._held.append(data)
            self.pause()
            task = asyncio.create_task(self._release())
            joint.waiting.add(task)
            task.add_done_callback(joint.waiting.discard)

    def eof_received(self) -> bool:
        self.has_ended = True
        if self._early is None and not self._held:
            self._pass_end()
        return True  # it may be answered still

    def _pass_end(self) -> None:
        other = self.other.transport
        if other is not None and not other.is_closing():
            other.write_eof()
        self._joint.has_ended()

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        other = self.other.transport
        if other is None:
            self._joint.finish()
        else:
            other.close()  # once what waits has been written

    def pause_writing(self) -> None:
        self.other.pause()

    def resume_writing(self) -> None:
        self.other.resume()

    def pause(self) -> None:
        self._pauses += 1
        if self._pauses == 1 and self.transport is not None:
            self.transport.pause_reading()

    def resume(self) -> None:
        self._pauses -= 1
        if self._pauses == 0 and self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()

    def _pass(self, data: bytes) -> None:
        if self.other.transport is not None:
            self.other.transport.write(data)

    async def _release(self) -> None:
        try:
            await self._joint.meter.allowed()
        except Exception as error:  # noqa: BLE001 - whatever it is ends the copying, and is told to who began it
            self._joint.finish(error)
            return
        self._joint.moved_at = self._joint.loop.time()
        held, self._held = self._held, []
        for data in held:
            self._pass(data)
        self.resume()
        if self.has_ended:
            self._pass_end()
