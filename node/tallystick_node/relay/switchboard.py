"""The relay: who is registered, and which connection is meant for whom.

It reads the server name of a ClientHello, tells that node over its control connection, and joins the caller's socket to
the one that the node dials back. What it copies is TLS between those two.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tallystick_node.relay.account import Account
from tallystick_node.relay.hello import TOKEN_BYTES, UNRECOGNIZED_NAME, BadHello, Opening, peek_opening
from tallystick_node.relay.splice import splice
from tallystick_protocol.errors import TallystickError
from tallystick_protocol.frames import Frame, Kind
from tallystick_protocol.peer import Channel
from tallystick_protocol.transport.contact import label
from tallystick_protocol.types import Address

log = logging.getLogger(__name__)

DIAL_BACK_TIMEOUT_S = 10.0
CALLER_BURST = 64
CALLS_PER_S = 16.0
CALLERS_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """sockets_per_node: joined ones and calls that wait. sockets: of all nodes together."""

    nodes: int = 256
    sockets_per_node: int = 64
    sockets: int = 2048
    idle_s: float = 120.0


@dataclass(slots=True)
class Registration:
    """A node that can be called: its control connection, and who pays for it."""

    node: Address
    channel: Channel
    account: Account


@dataclass(slots=True)
class _Call:
    registration: Registration
    answer: asyncio.Future[socket.socket] = field(default_factory=asyncio.Future)


class Switchboard:
    """For one event loop."""

    def __init__(self, relay: Address, limits: RelayLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._own_name = label(relay)
        self._limits = limits
        self._clock = clock
        self._registered: dict[str, Registration] = {}
        self._calls: dict[bytes, _Call] = {}
        self._bridges: set[asyncio.Task[None]] = set()
        self._callers: dict[str, tuple[float, float]] = {}
        self.num_bytes = 0

    @property
    def num_nodes(self) -> int:
        return len(self._registered)

    @property
    def num_sockets(self) -> int:
        return len(self._bridges)

    def has_room(self, node: Address) -> bool:
        return label(node) in self._registered or len(self._registered) < self._limits.nodes

    def register(self, registration: Registration) -> Registration | None:
        """From now on calls for the node go to this connection; returns the registration that it replaces."""
        before = self._registered.get(label(registration.node))
        self._registered[label(registration.node)] = registration
        return before

    def unregister(self, registration: Registration) -> None:
        """Its connection has ended; what is joined already goes on."""
        if self._registered.get(label(registration.node)) is registration:
            del self._registered[label(registration.node)]

    async def divert(self, sock: socket.socket) -> bool:
        """Take over a connection that is not for the relay itself. Raises OSError; closes what means nothing."""
        try:
            opening = await peek_opening(sock)
        except (BadHello, TimeoutError) as error:
            log.debug("a connection was dropped: %s", error)
            sock.close()
            return True
        if opening.name == self._own_name:
            return False
        self._take(sock, opening)
        return True

    async def close(self) -> None:
        """Cut every joined connection."""
        for bridge in list(self._bridges):
            bridge.cancel()
        await asyncio.gather(*self._bridges, return_exceptions=True)

    def _take(self, sock: socket.socket, opening: Opening) -> None:
        if opening.token is not None:
            call = self._calls.pop(opening.token, None)
            if call is None or call.answer.done():
                sock.close()
            else:
                call.answer.set_result(sock)
            return
        found = self._registered.get(opening.name or "")
        if found is None or not self._may_call(sock, found):
            try:
                sock.send(UNRECOGNIZED_NAME)
            finally:
                sock.close()
            return
        bridge = asyncio.create_task(self._bridge(sock, found))
        self._bridges.add(bridge)
        bridge.add_done_callback(self._bridges.discard)

    async def _bridge(self, caller: socket.socket, registration: Registration) -> None:
        account = registration.account
        account.num_sockets += 1
        try:
            node = await self._call(registration)
        except (TallystickError, TimeoutError) as error:
            log.info("%s was called and does not answer (%s)", registration.node, type(error).__name__)
            caller.close()
            account.num_sockets -= 1
            return
        except BaseException:
            caller.close()
            account.num_sockets -= 1
            raise
        before = account.num_bytes
        try:
            for sock in (caller, node):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await splice(caller, node, account, self._limits.idle_s)
        except TallystickError as error:
            log.info("a connection to %s was cut: %s", registration.node, error)
        except OSError as error:
            log.debug("a connection to %s ended early (%s)", registration.node, error)
        finally:
            account.num_sockets -= 1
            self.num_bytes += account.num_bytes - before

    async def _call(self, registration: Registration) -> socket.socket:
        """Ask a node to dial back. Raises TimeoutError, Unreachable."""
        token, call = secrets.token_bytes(TOKEN_BYTES), _Call(registration)
        self._calls[token] = call
        try:
            async with asyncio.timeout(DIAL_BACK_TIMEOUT_S):
                await registration.channel.send(Frame(Kind.CALL, {"token": token}))
                return await call.answer
        except BaseException:
            if call.answer.done() and not call.answer.cancelled():
                call.answer.result().close()
            raise
        finally:
            self._calls.pop(token, None)

    def _may_call(self, sock: socket.socket, registration: Registration) -> bool:
        """Within the limits, and not too often from one address (a token bucket)."""
        if registration.account.num_sockets >= self._limits.sockets_per_node:
            return False
        if len(self._bridges) >= self._limits.sockets:
            return False
        caller, now = str(sock.getpeername()[0]), self._clock()
        left, since = self._callers.pop(caller, (float(CALLER_BURST), now))
        left = min(float(CALLER_BURST), left + (now - since) * CALLS_PER_S)
        self._callers[caller] = (max(0.0, left - 1.0), now)
        while len(self._callers) > CALLERS_REMEMBERED:
            del self._callers[next(iter(self._callers))]
        return left >= 1.0
