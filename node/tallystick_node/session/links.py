"""Push connections to other nodes: dialled to what a staked node has signed or put on chain, opened by signature."""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tallystick_node.session.distances import Distances
from tallystick_protocol.errors import TallystickError, Unreachable
from tallystick_protocol.frames import Frame, Kind, take
from tallystick_protocol.messages import PushOpen
from tallystick_protocol.peer import Channel, Peers, expect
from tallystick_protocol.signing import Domain, Key, seal
from tallystick_protocol.transport.contact import Contact
from tallystick_protocol.types import Address, SessionId

OPEN_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Link:
    """An open push connection.

    position: how many rows the next hop has in its epoch `theirs`. ours: the epoch that was named in dialling it.
    """

    node: Address
    channel: Channel
    position: int
    theirs: int
    ours: int

    async def send(self, frame: Frame) -> None:
        """Raises Unreachable naming the hop."""
        try:
            await self.channel.send(frame)
        except Unreachable:
            raise gone(self.node) from None

    async def ended(self) -> None:
        """Read until the connection has ended. This answers the peer's pings: it drops a link that nobody reads."""
        try:
            while True:
                await self.channel.receive()  # a next hop has nothing to say that the client does not hear from it
        except TallystickError:
            await self.channel.close()


class Dialler:
    """Opens push connections."""

    def __init__(
        self,
        peers: Peers,
        node: Address,
        key: Key,
        domain: Domain,
        find: Callable[[Address], Awaitable[Contact]],
        clock: Callable[[], float],
    ) -> None:
        """find(node): how a staked node is dialled, from its Reach and the chain; raises Unreachable."""
        self._peers = peers
        self._node = node
        self._key = key
        self._domain = domain
        self._find = find
        self._clock = clock
        self.distances = Distances()

    async def dial(self, node: Address, session: SessionId, attempt: int, epoch: int) -> Link:
        """A push connection to a hop that the client has opened, for rows of an epoch.

        Raises Unreachable, or what the hop answers.
        """
        contact = await self._find(node)
        began = time.monotonic()
        channel = await self._peers.connect(contact, node)
        self.distances.note(node, time.monotonic() - began, channel.spki)
        push = PushOpen(node, session, attempt, self._node, channel.spki, secrets.token_bytes(32), int(self._clock()))
        try:
            await channel.send(Frame(Kind.PUSH_OPEN, {"push": seal(self._domain, push, self._key), "epoch": epoch}))
            opened = await expect(channel, Kind.PUSH_OPENED, OPEN_TIMEOUT_S)
            return Link(node, channel, take(opened.body, "position", int), take(opened.body, "epoch", int), epoch)
        except BaseException as error:
            if isinstance(error, TallystickError):
                error.fields.setdefault("hop", node)
            await channel.close()
            raise


def gone(node: Address) -> Unreachable:
    """What the client is told of a link that has ended."""
    return Unreachable(f"the next hop {node} is gone", hop=node)
