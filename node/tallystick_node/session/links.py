"""Push connections to other nodes: dialled only to what a staked node has put on chain, opened with our signature."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from tallystick_protocol.errors import TallystickError, Unreachable
from tallystick_protocol.frames import Frame, Kind, take
from tallystick_protocol.messages import PushOpen
from tallystick_protocol.peer import Channel, Peers, expect
from tallystick_protocol.signing import Domain, Key, seal
from tallystick_protocol.types import ZERO32, Address, SessionId

OPEN_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Link:
    """An open push connection and the position at which the next hop wants rows to begin."""

    node: Address
    channel: Channel
    position: int

    async def send(self, frame: Frame) -> None:
        """Raises Unreachable naming the hop."""
        try:
            await self.channel.send(frame)
        except Unreachable:
            raise self.gone() from None

    async def ended(self) -> None:
        """Read until the connection has ended. This answers the peer's pings: it drops a link that nobody reads."""
        try:
            while True:
                await self.channel.receive()  # a next hop has nothing to say that the client does not hear from it
        except TallystickError:
            await self.channel.close()

    def gone(self) -> Unreachable:
        """What the client is told of a link that has ended."""
        return Unreachable(f"the next hop {self.node} is gone", hop=self.node)


class Dialler:
    """Opens push connections."""

    def __init__(
        self,
        peers: Peers,
        node: Address,
        key: Key,
        domain: Domain,
        locate: Callable[[Address], tuple[str, ...]],
        clock: Callable[[], float],
    ) -> None:
        """locate(node): the URLs at which a staked node serves, from the chain; blocking."""
        self._peers = peers
        self._node = node
        self._key = key
        self._domain = domain
        self._locate = locate
        self._clock = clock

    async def dial(self, node: Address, session: SessionId, attempt: int) -> Link:
        """A push connection to a hop that the client has opened. Raises Unreachable, or what the hop answers."""
        urls = await asyncio.to_thread(self._locate, node)
        last: TallystickError = Unreachable(f"the chain knows no address of {node}", hop=node)
        for url in urls:
            try:
                return await self._open(url, node, session, attempt)
            except Unreachable as error:
                last = error
        raise last

    async def _open(self, url: str, node: Address, session: SessionId, attempt: int) -> Link:
        channel = await self._peers.connect(url, node)
        push = PushOpen(node, session, attempt, self._node, ZERO32, secrets.token_bytes(32), int(self._clock()))
        try:
            await channel.send(Frame(Kind.PUSH_OPEN, {"push": seal(self._domain, push, self._key)}))
            opened = await expect(channel, Kind.PUSH_OPENED, OPEN_TIMEOUT_S)
            return Link(node, channel, take(opened.body, "position", int))
        except BaseException:
            await channel.close()
            raise
