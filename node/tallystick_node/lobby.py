"""Connections that take a place and give nothing for it: those that ask for nothing, and those that read nothing.

Places are few and connecting is free. So whoever has not begun a session gives its place to the next one that comes,
who was silent for longest first; and nobody is written to, or waited for, who does not read.
"""

from __future__ import annotations

import socket
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

UNREAD_TIMEOUT_S = 30.0
"""A peer that takes nothing of what waits for it, or acknowledges nothing, for so long is gone."""

SPARE = 64
"""Connections that have ended and are still in the list."""


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's, but for pings of a peer that does not read: their answers would pile up in memory, without limit. And
    a connection that is ending by itself is not asked to end once more, which the protocol takes for a mistake."""

    def shutdown(self) -> None:
        if not self.transport.is_closing():
            super().shutdown()

    def handle_ping(self) -> None:
        if self.writable.is_set():
            super().handle_ping()
        else:
            self.conn.data_to_send()  # the pong, forgotten


def forget_who_does_not_read(sock: socket.socket) -> None:
    """Have the system end a TCP connection whose peer takes nothing for UNREAD_TIMEOUT_S, also while it is closing.

    Linux counts a window that stays shut and what stays unacknowledged alike (tcp(7)); elsewhere nothing happens.
    """
    if (option := getattr(socket, "TCP_USER_TIMEOUT", None)) is not None:
        sock.setsockopt(socket.IPPROTO_TCP, option, int(1000 * UNREAD_TIMEOUT_S))


@dataclass(slots=True, eq=False)
class Guest:
    """One connection. protocol: uvicorn's, of its HTTP. has_session: whether what it began is being served."""

    protocol: Any
    has_session: bool = False

    def is_open(self, connections: Collection[Any]) -> bool:
        """connections: those that uvicorn counts; a WebSocket stands there in the place of its HTTP."""
        return self.protocol.transport.get_protocol() in connections

    @property
    def is_idle(self) -> bool:
        """Whether it waits for nothing, as far as anybody knows."""
        protocol = self.protocol
        if protocol.transport.get_protocol() is not protocol:
            return not self.has_session
        return protocol.cycle is None or protocol.cycle.response_complete


class Lobby:
    """All connections, in the order in which they came."""

    def __init__(self, connections: Collection[Any], places: int) -> None:
        """connections: those that uvicorn counts; places: how many there may be."""
        self._connections = connections
        self._places = places
        self._guests: list[Guest] = []

    def enter(self, guest: Guest) -> None:
        self._guests.append(guest)
        if len(self._guests) > 2 * len(self._connections) + SPARE:
            self._forget_ended()

    def make_room(self) -> bool:
        """Whether there is a place, after the connection that was idle for longest has lost its own if need be."""
        if len(self._connections) < self._places:
            return True
        self._forget_ended()
        for number, guest in enumerate(self._guests):
            if guest.is_idle:
                del self._guests[number]
                guest.protocol.transport.abort()
                return True
        return False

    def _forget_ended(self) -> None:
        self._guests = [guest for guest in self._guests if guest.is_open(self._connections)]
