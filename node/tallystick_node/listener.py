"""How connections become served: a connected socket and a role go in, and uvicorn's protocol takes over.

Direct sockets and those that were dialled back through a relay are one path; on both this side is the TLS server. Plain
sockets exist on loopback only.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI
from uvicorn.server import ServerState

from tallystick_node.lobby import Guest, Lobby, WebSocketProtocol, forget_who_does_not_read
from tallystick_node.reach.tls import TlsKeys
from tallystick_protocol.errors import ConfigError
from tallystick_protocol.frames import MAX_FRAME
from tallystick_protocol.types import ZERO32

log = logging.getLogger(__name__)

Role = Literal["direct", "dialled back"]
Divert = Callable[[socket.socket], Awaitable[bool]]
HEAD_TIMEOUT_S = 10.0
HANDSHAKE_TIMEOUT_S = 10.0
SHUTDOWN_TIMEOUT_S = 5.0
ACCEPT_PAUSE_S = 0.2
MAX_CONNECTIONS = 1024
MAX_WELCOMES = 512
MAX_WELCOMES_PER_PEER = 64
"""Connections that have not shaken hands yet."""


def bind(host: str, port: int, encrypted: bool) -> socket.socket:
    """A listening socket. Raises ConfigError for a port that is taken, or for an open address without encryption."""
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise ConfigError(f"host = {host!r} is not an address; use 127.0.0.1, or 0.0.0.0 for all there are") from None
    if not address.is_loopback and not encrypted:
        raise ConfigError(f'host = {host!r} with tls = "off": plain sockets exist on loopback only; use tls = "auto"')
    sock = socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if address.version == 6 and address.is_unspecified:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
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

    def __init__(self, app: FastAPI, keys: TlsKeys | None = None, divert: Divert | None = None) -> None:
        """keys: what TLS is spoken with; None: plain sockets.

        divert(socket): takes an accepted socket over if it is not meant for this app; True when it has.
        """
        self._config = uvicorn.Config(
            app,
            http="h11",
            ws=WebSocketProtocol,
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
        self._lobby = Lobby(self._state.connections, MAX_CONNECTIONS)
        self._keys = keys
        self._divert = divert
        self._welcomes: dict[asyncio.Task[None], None] = {}  # in the order in which they began
        self._greeted: Counter[str] = Counter()

    async def attach(self, sock: socket.socket, role: Role = "direct") -> None:
        """Serve a connected socket. A peer that completes no request for HEAD_TIMEOUT_S is dropped.

        Raises OSError (ssl.SSLError among them) when the handshake fails, and closes the socket.
        """
        loop = asyncio.get_running_loop()
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            forget_who_does_not_read(sock)
        identity = self._keys.current if self._keys is not None else None
        state: dict[str, Any] = {"spki": identity.spki if identity is not None else ZERO32, "role": role}

        def protocol() -> asyncio.Protocol:
            protocol_class: Any = self._config.http_protocol_class
            made: Any = protocol_class(config=self._config, server_state=self._state, app_state=state)
            state["guest"] = Guest(made)
            loop.call_later(HEAD_TIMEOUT_S, _drop_silent, made, None)
            return made  # type: ignore[no-any-return]

        try:
            if identity is None:
                await loop.connect_accepted_socket(protocol, sock)
            else:
                await loop.connect_accepted_socket(
                    protocol,
                    sock,
                    ssl=identity.context,
                    ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
                    ssl_shutdown_timeout=SHUTDOWN_TIMEOUT_S,
                )
        except OSError:
            sock.close()
            raise
        self._lobby.enter(state["guest"])

    async def serve(self, listening: socket.socket) -> None:
        """Accept until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    sock, peer = await loop.sock_accept(listening)
                except OSError as error:  # no file descriptor left, or the peer has gone already
                    log.warning("a connection could not be accepted (%s)", error.strerror)
                    await asyncio.sleep(ACCEPT_PAUSE_S)
                    continue
                if not self._has_room(str(peer[0])):
                    sock.close()
                    continue
                welcome = asyncio.create_task(self._welcome(sock, str(peer[0])))
                self._welcomes[welcome] = None
                welcome.add_done_callback(self._welcomes.pop)
        finally:
            for welcome in list(self._welcomes):
                welcome.cancel()

    def _has_room(self, peer: str) -> bool:
        if self._greeted[peer] >= MAX_WELCOMES_PER_PEER or not self._lobby.make_room():
            return False
        if len(self._welcomes) >= MAX_WELCOMES:
            next(iter(self._welcomes)).cancel()  # who takes longest
        return True

    async def _welcome(self, sock: socket.socket, peer: str) -> None:
        """Who cannot shake hands is of no interest, and costs no line in the log."""
        self._greeted[peer] += 1
        is_taken = False
        try:
            is_taken = self._divert is not None and await self._divert(sock)
            if not is_taken:
                is_taken = True
                await self.attach(sock)  # which closes it, if it comes to that
        except OSError as error:
            log.debug("a connection was not taken (%s)", error)
        finally:
            if not is_taken:
                sock.close()
            self._greeted[peer] -= 1
            if not self._greeted[peer]:
                del self._greeted[peer]

    async def close(self, timeout_s: float = 5.0) -> None:
        """Ask every connection to end, wait a while for it, and cut those that do not."""
        for connection in list(self._state.connections):
            connection.shutdown()
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._state.connections and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        for connection in list(self._state.connections):
            connection.transport.abort()


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
