"""What a connection begins with, read without taking it off the socket: a ClientHello's server name, or a dial-back.

The ClientHello is read as RFC 8446, 4.1.2 writes it, within one record of at most 16 KiB, and everything else refused.
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass

HELLO_TIMEOUT_S = 10.0
MAX_RECORD = 1 << 14
DIAL_BACK = b"DIAL1 "
TOKEN_BYTES = 16
DIAL_BACK_BYTES = len(DIAL_BACK) + 2 * TOKEN_BYTES + 1
UNRECOGNIZED_NAME = bytes([0x15, 3, 3, 0, 2, 2, 112])
"""A fatal TLS alert: nobody of that name is here (RFC 8446, 6.2)."""

_HEADER = 5
_HANDSHAKE = 0x16
_CLIENT_HELLO = 1
_SERVER_NAME = 0
_PAUSES_S = (0.005, 0.02, 0.1, 0.5)


class BadHello(ValueError):
    """Neither a ClientHello within bounds nor a dial-back."""


def dial_back_line(token: bytes) -> bytes:
    """What a node sends first on a connection that it dials back to its relay."""
    return DIAL_BACK + token.hex().encode() + b"\n"


@dataclass(frozen=True, slots=True)
class Opening:
    """What a connection wants: a server name (None: a ClientHello without one), or to answer a call by its token."""

    name: str | None = None
    token: bytes | None = None


async def peek_opening(sock: socket.socket) -> Opening:
    """Raises BadHello, TimeoutError, OSError. A ClientHello stays in the socket; a dial-back line is taken off it."""
    async with asyncio.timeout(HELLO_TIMEOUT_S):
        head = await _peek(sock, _HEADER)
        if head.startswith(DIAL_BACK[:_HEADER]):
            await _peek(sock, DIAL_BACK_BYTES)
            return Opening(token=_token(sock.recv(DIAL_BACK_BYTES)))
        if head[0] != _HANDSHAKE or head[1] != 3:
            raise BadHello("not a TLS handshake")
        size = int.from_bytes(head[3:5], "big")
        if not 4 < size <= MAX_RECORD:
            raise BadHello("a record of this size holds no ClientHello")
        return Opening(name=server_name((await _peek(sock, _HEADER + size))[_HEADER:]))


def server_name(message: bytes) -> str | None:
    """The host name of a whole ClientHello message; None if it has no such extension. Raises BadHello."""
    hello = _Reader(message)
    if hello.number(1) != _CLIENT_HELLO or hello.number(3) != len(message) - 4:
        raise BadHello("not one whole ClientHello")
    hello.take(2 + 32)  # version, random
    hello.vector(1, 32)  # session id
    hello.vector(2, MAX_RECORD)  # cipher suites
    hello.vector(1, 255)  # compression methods
    extensions = _Reader(hello.vector(2, MAX_RECORD))
    hello.end()
    found: str | None = None
    while not extensions.at_end:
        kind, data = extensions.number(2), extensions.vector(2, MAX_RECORD)
        if kind == _SERVER_NAME:
            if found is not None:
                raise BadHello("two server names")
            found = _host_name(data)
    return found


def _host_name(data: bytes) -> str:
    outer = _Reader(data)
    names = _Reader(outer.vector(2, 512))
    outer.end()
    if names.number(1) != 0:
        raise BadHello("a server name that is no host name")
    name = names.vector(2, 255)
    names.end()
    try:
        return name.decode("ascii").lower()
    except UnicodeDecodeError:
        raise BadHello("a server name that is not ASCII") from None


class _Reader:
    """Big-endian numbers and length-prefixed vectors, from front to end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def at_end(self) -> bool:
        return self._at == len(self._data)

    def take(self, size: int) -> bytes:
        found = self._data[self._at : self._at + size]
        if len(found) != size:
            raise BadHello("it ends too early")
        self._at += size
        return found

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, prefix: int, limit: int) -> bytes:
        size = self.number(prefix)
        if size > limit:
            raise BadHello("it holds something too long")
        return self.take(size)

    def end(self) -> None:
        if not self.at_end:
            raise BadHello("it goes on where it should end")


async def _peek(sock: socket.socket, size: int) -> bytes:
    """The first `size` bytes, left in the socket. Raises BadHello when the peer ends before, OSError."""
    loop = asyncio.get_running_loop()
    pauses = iter(_PAUSES_S)
    while True:
        try:
            data = sock.recv(size, socket.MSG_PEEK)
        except BlockingIOError:
            await _readable(loop, sock)
            continue
        if len(data) == size:
            return data
        if not data:
            raise BadHello("it ended early")
        await asyncio.sleep(next(pauses, _PAUSES_S[-1]))  # what is there keeps the socket readable: look again later


async def _readable(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(sock, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(sock)


def _token(line: bytes) -> bytes:
    try:
        token = bytes.fromhex(line[len(DIAL_BACK) : -1].decode("ascii"))
    except ValueError:
        raise BadHello("a dial-back without a token") from None
    if len(token) != TOKEN_BYTES or not line.endswith(b"\n"):
        raise BadHello("a dial-back without a token")
    return token
