"""Where nodes are at this time: their Reach records, from whoever has them; the chain says where to begin.

A Reach proves itself by its signature, so it may come from anybody and over any connection. The chain's word on a
node's keys serves to ask that node for its Reach; sessions are opened only to a key that an unexpired Reach names.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

from tallystick_protocol.errors import BadMessage, BadSignature, ChainError, TallystickError, Unreachable
from tallystick_protocol.peer import Peers
from tallystick_protocol.signing import Domain
from tallystick_protocol.transport.contact import Contact
from tallystick_protocol.transport.reach import MAX_REACH, REACH_LIFETIME_S, Reach, unseal_reach
from tallystick_protocol.types import Address

ASK_TIMEOUT_S = 2.0
CLOCK_SKEW_S = 60
WITNESSES = 3
MAX_KNOWN = 4096
SEEKING_AT_ONCE = 8
MISSED_S = 30.0
"""Others are not asked again for a node within this."""


class Directory:
    """Reach records that were verified, the newest of each node. For one event loop."""

    def __init__(
        self,
        peers: Peers,
        domain: Domain,
        node_of: Callable[[Address], Address | None],
        locate: Callable[[Address], Contact | None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """node_of(signer): the node that a hot key signs for. locate(node): what a staked node has put on chain.

        Both read the chain, and block.
        """
        self._peers = peers
        self._domain = domain
        self._node_of = node_of
        self._locate = locate
        self._clock = clock
        self._known: dict[Address, tuple[Reach, bytes]] = {}
        self._signers: dict[Address, Address] = {}
        self._missed: dict[Address, float] = {}
        self._doubted: set[Address] = set()
        self._seeking = 0
        peers.on_unreachable = lambda contact: self.doubt(contact.node)

    def sealed(self, node: Address) -> bytes | None:
        """The newest record of a node as it travels, while it holds."""
        return self._known[node][1] if self.known(node) is not None else None

    def known(self, node: Address) -> Reach | None:
        """The newest record of a node, while it holds."""
        reach, _ = self._known.get(node, (None, b""))
        return reach if reach is not None and reach.expires > self._clock() else None

    def doubt(self, node: Address) -> None:
        """Its record leads nowhere at this time: ask for a newer one before it is used again."""
        if node in self._known:
            self._doubted.add(node)

    async def verify(self, data: bytes, node: Address | None = None) -> Reach:
        """A record that holds and is signed by a hot key of its node, or by the node's own key.

        node: whose it should be. Raises BadMessage, BadSignature, ChainError.
        """
        reach, signer = unseal_reach(self._domain, data)
        now = self._clock()
        if node is not None and reach.node != node:
            raise BadMessage(f"the Reach is {reach.node}'s, not {node}'s")
        if reach.expires <= now or reach.expires > now + REACH_LIFETIME_S + CLOCK_SKEW_S:
            raise BadMessage("the Reach has expired, or lasts more than a day")
        if signer != reach.node and await self._signs_for(signer) != reach.node:
            raise BadSignature(f"the Reach of {reach.node} is signed by {signer}, who may not sign for it")
        return reach

    async def learn(self, data: bytes, node: Address | None = None) -> Reach:
        """Keep a record that is newer than what is known; returns the newest. Raises what `verify` does."""
        reach = await self.verify(data, node)
        self._doubted.discard(reach.node)
        before = self._known.get(reach.node)
        if before is None or before[0].seq <= reach.seq:
            self._known.pop(reach.node, None)
            self._known[reach.node] = (reach, data)
            while len(self._known) > MAX_KNOWN:
                oldest = next(iter(self._known))
                del self._known[oldest]
                self._doubted.discard(oldest)
        return self._known[reach.node][0]

    async def find(self, node: Address) -> Contact:
        """How to dial a staked node. Raises Unreachable, ChainError."""
        if (reach := self._trusted(node)) is not None:
            return reach.contact
        first = await asyncio.to_thread(self._locate, node)
        if first is None:
            raise Unreachable(f"the chain knows no address of {node}", hop=node)
        return await self.contact(first)

    async def info(self, first: Contact) -> dict[str, Any]:
        """`/v1/info` of a node that the chain describes. Raises Unreachable, BadMessage."""
        return await self._peers.info(await self.contact(first))

    async def contact(self, first: Contact) -> Contact:
        """How to dial a node. first: what the chain says of it, or a setting.

        A plain contact stays what it is. Raises Unreachable when nobody asked has a Reach of the node that holds.
        """
        node = first.node
        reach = self._trusted(node)
        if reach is not None and reach.seq >= first.seq:
            return reach.contact
        if not first.pins and first.seq == 0:
            return first
        why = await self._ask(first, node, any_key=not first.pins)
        if why is not None and "wrong_key" in why.fields:  # it has changed its keys since
            why = await self._ask(first, node, any_key=True)
        if why is not None:
            await self._ask_others(first)
        reach = self.known(node)
        if reach is None or reach.seq < first.seq:
            raise Unreachable(why.message if why else f"{node} gives an older Reach than it has on chain", hop=node)
        return reach.contact

    async def introduce(self, first: Contact) -> Contact:
        """As `contact`, for a node whose keys are not known: who answers must give a Reach that the node signed."""
        if self._trusted(first.node) is None:
            why = await self._ask(first, first.node, any_key=True)
            if why is not None:
                raise Unreachable(why.message, hop=first.node)
        return await self.contact(first)

    def _trusted(self, node: Address) -> Reach | None:
        """The newest record, unless it has led nowhere."""
        return None if node in self._doubted else self.known(node)

    async def _ask(self, whom: Contact, node: Address, any_key: bool) -> TallystickError | None:
        """Ask for a node's Reach; returns what is wrong, or nothing."""
        try:
            data = await self._peers.ask(whom, f"/v1/reach/{node}", MAX_REACH, ASK_TIMEOUT_S, any_key=any_key)
            await self.learn(data, node)
        except (Unreachable, BadMessage, BadSignature, ChainError) as error:
            return error
        return None

    async def _ask_others(self, first: Contact) -> None:
        """A few, for a few nodes at a time, and not the same again within a while: most who do not answer are gone."""
        node, now = first.node, self._clock()
        if self._seeking >= SEEKING_AT_ONCE or self._missed.get(node, 0.0) > now - MISSED_S:
            return
        self._missed = {other: at for other, at in self._missed.items() if at > now - MISSED_S} | {node: now}
        others = [reach for other in self._known if other != node and (reach := self._trusted(other)) is not None]
        drawn = random.sample(others, min(WITNESSES, len(others)))
        self._seeking += 1
        try:
            await asyncio.gather(*(self._ask(other.contact, node, any_key=False) for other in drawn))
        finally:
            self._seeking -= 1

    async def _signs_for(self, signer: Address) -> Address | None:
        if signer not in self._signers:
            node = await asyncio.to_thread(self._node_of, signer)
            if node is None:
                return None
            self._signers[signer] = node  # a binding is for ever
        return self._signers[signer]
