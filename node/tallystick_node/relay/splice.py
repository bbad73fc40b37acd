"""Copying between two sockets, both ways, as fast as the slower one reads and only as far as somebody pays."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Protocol

IDLE_S = 120.0
LINGER_S = 30.0
"""After one side has ended, the other one may go on for so long."""

CHUNK = 64 * 1024
"""Bytes that are held for each direction; nothing more is read before they are written."""


class Meter(Protocol):
    """Who counts what is copied."""

    def count(self, num_bytes: int) -> bool:
        """Add bytes that are about to be written; False when they have to wait for `allowed`."""

    async def allowed(self) -> None:
        """Return when the bytes may be written. Raises TallystickError when they may not."""


async def splice(one: socket.socket, other: socket.socket, meter: Meter, idle_s: float = IDLE_S) -> None:
    """Copy until both sides have ended, one has failed, nothing moves for `idle_s`, or the meter refuses.

    Closes both sockets, which must not block. Raises TallystickError only.
    """
    clock = asyncio.get_running_loop().time
    last, limit = clock(), idle_s

    async def pump(source: socket.socket, sink: socket.socket) -> None:
        nonlocal last, limit
        loop, view = asyncio.get_running_loop(), memoryview(bytearray(CHUNK))
        while size := await loop.sock_recv_into(source, view):
            last = clock()
            if not meter.count(size):
                await meter.allowed()
            await loop.sock_sendall(sink, view[:size])
            last = clock()
        limit = min(idle_s, LINGER_S)
        sink.shutdown(socket.SHUT_WR)

    async def watch() -> None:
        while (left := last + limit - clock()) > 0:
            await asyncio.sleep(min(left, LINGER_S))

    pumps = asyncio.gather(pump(one, other), pump(other, one))
    watching = asyncio.create_task(watch())
    try:
        await asyncio.wait((pumps, watching), return_when=asyncio.FIRST_COMPLETED)
        if pumps.done():
            with contextlib.suppress(OSError):
                pumps.result()
    finally:
        for task in (pumps, watching):
            task.cancel()
        await asyncio.gather(pumps, watching, return_exceptions=True)
        one.close()
        other.close()
