"""How connections become served: a connected socket and a role go in, and uvicorn's protocol takes over.

Direct, dialled-back and hole-punched sockets are one path. In this version the only role is `direct` and the only
addresses are loopback ones: anything else waits for transport security (docs/threats.md).
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI
from uvicorn.server import ServerState

from tallystick_protocol.errors import ConfigError
from tallystick_protocol.frames import MAX_FRAME

log = logging.getLogger(__name__)

Role = Literal["direct"]
HEAD_TIMEOUT_S = 10.0
ACCEPT_PAUSE_S = 0.2
MAX_CONNECTIONS = 1024


def bind_loopback(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError for a port that is taken, or an address that is not loopback."""
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise ConfigError(f"host = {host!r} is not an address; use 127.0.0.1") from None
    if not address.is_loopback:
        raise ConfigError(
            f"host = {host!r}: this version serves on loopback only, because connections are not encrypted yet;"
            " use 127.0.0.1"
        )
    sock = socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((str(address), port))
    except OSError as error:
        sock.close()
        raise ConfigError(f"port {port} on {host} cannot be used ({error.strerror}); choose another or 0") from None
    sock.listen(128)
    sock.setblocking(False)
    return sock


class Listener:
    """Serves an app on sockets, however they came to be connected."""

    def __init__(self, app: FastAPI) -> None:
        self._config = uvicorn.Config(
            app,
            http="h11",
            ws="websockets-sansio",
            ws_max_size=MAX_FRAME,
            ws_per_message_deflate=False,
            ws_ping_interval=10.0,
            ws_ping_timeout=20.0,
            access_log=False,
            log_config=None,
            lifespan="off",
            server_header=False,
            date_header=False,
            proxy_headers=False,
            timeout_keep_alive=5,
            h11_max_incomplete_event_size=16 * 1024,
        )
        self._config.load()
        self._state = ServerState()

    async def attach(self, sock: socket.socket, role: Role = "direct") -> None:
        """Serve a connected socket. A peer that completes no request for HEAD_TIMEOUT_S is dropped."""
        loop = asyncio.get_running_loop()
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def protocol() -> asyncio.Protocol:
            protocol_class: Any = self._config.http_protocol_class
            made: Any = protocol_class(config=self._config, server_state=self._state, app_state={})
            loop.call_later(HEAD_TIMEOUT_S, _drop_silent, made, None)
            return made  # type: ignore[no-any-return]

        await loop.connect_accepted_socket(protocol, sock)

    async def serve(self, listening: socket.socket) -> None:
        """Accept until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listening)
            except OSError as error:  # no file descriptor left, or the peer has gone already
                log.warning("a connection could not be accepted (%s)", error.strerror)
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            if len(self._state.connections) >= MAX_CONNECTIONS:
                sock.close()
                continue
            try:
                await self.attach(sock)
            except OSError:
                sock.close()

    async def close(self, timeout_s: float = 5.0) -> None:
        """Ask every connection to end, and wait a while for it."""
        for connection in list(self._state.connections):
            connection.shutdown()
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._state.connections and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)


def _drop_silent(protocol: Any, before: Any) -> None:
    """Close a connection that has not begun another request since `before`, nor is waiting for an answer.

    Slow heads, slow bodies and connections kept alive for nothing (slow loris) are all of this kind.
    """
    transport, cycle = protocol.transport, protocol.cycle
    if transport is None or transport.is_closing() or protocol not in _open(protocol):
        return
    if cycle is before and (cycle is None or cycle.response_complete):
        transport.close()
    else:
        protocol.loop.call_later(HEAD_TIMEOUT_S, _drop_silent, protocol, cycle)


def _open(protocol: Any) -> Any:
    """The connections that still speak HTTP: one that became a WebSocket has left this set."""
    return protocol.connections
