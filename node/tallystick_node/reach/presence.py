"""How one node is there for others: its port, its relays, its TLS keys, and the Reach that names them all."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from tallystick_node.config import NodeConfig
from tallystick_node.listener import Listener
from tallystick_node.reach.announcer import Announcer
from tallystick_node.reach.desk import ReachDesk
from tallystick_node.reach.places import dial_policy, direct_addrs, parse_relay
from tallystick_node.reach.tls import TlsKeys
from tallystick_node.relay.agent import RelayAgent
from tallystick_node.relay.wallet import RelayPurse
from tallystick_protocol.chain.reads import Chain
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.errors import TallystickError
from tallystick_protocol.peer import Peers
from tallystick_protocol.signing import Key
from tallystick_protocol.transport.contact import Contact, label
from tallystick_protocol.transport.directory import Directory
from tallystick_protocol.transport.scopes import is_loopback
from tallystick_protocol.types import Address, ModelId, Wei

log = logging.getLogger(__name__)

RELAYS_TIMEOUT_S = 20.0


class Presence:
    """Made once per process; `Peers` and `Directory` in it are the node's."""

    def __init__(
        self, config: NodeConfig, node: Address, hot: Key, chain: Chain, state: Path, listening: socket.socket | None
    ) -> None:
        """listening: the port, if the node has one. Raises ConfigError."""
        self._config = config
        self._node = node
        self._hot = hot
        self._chain = chain
        self._listening = listening
        self._model: ModelId | None = None
        self._relays = [parse_relay(text) for text in config.relays]
        inward = bool(self._relays) and not config.announce and is_loopback(config.host)
        self._direct = () if inward else direct_addrs(listening, config.announce)
        places = [*self._direct, *(addr for relay in self._relays for addr in relay.addrs)]
        self.may_dial = dial_policy(config.host, places)
        self.peers = Peers(self.may_dial)
        domain = chain.book.staking_domain
        self.directory = Directory(self.peers, domain, chain.node_of, chain.locate)
        self.keys: TlsKeys | None = None
        self._announcer: Announcer | None = None
        if config.is_encrypted:
            names = frozenset({label(node), *(addr.sni for addr in self._direct if addr.sni)})
            self.keys = TlsKeys(state / "tls", names)
            self._announcer = Announcer(node, hot, domain, self.keys, self._direct, self.peers, self._others)
        self.desk = ReachDesk(node, self.directory, self.peers, self._own, lambda other: chain.node(other).active > 0)

    async def announce(self, model: ModelId) -> Contact:
        """Where this node is, tried by others; for the chain. The listener and `tasks` run. Raises ConfigError."""
        self._model = model
        if self._announcer is None:
            return Contact(self._node, self._direct)
        await self._announcer.wait_for_relays(len(self._relays), RELAYS_TIMEOUT_S)
        return await self._announcer.announce()

    def tasks(self, listener: Listener) -> list[Coroutine[Any, Any, None]]:
        """What brings connections to the listener as long as the node serves."""
        running: list[Coroutine[Any, Any, None]] = []
        if self._listening is not None:
            running.append(listener.serve(self._listening))
        purse = RelayPurse(Wallet(self._chain, self._hot), Wei(self._config.relay_budget))
        for relay in self._relays:
            agent = RelayAgent(
                relay,
                self._node,
                self._hot,
                self._chain.book.staking_domain,
                self.peers,
                self.directory,
                purse,
                Wei(self._config.relay_max_price),
                self.may_dial,
            )
            running.append(agent.run(_attach_to(listener), self._relayed()))
        return running

    def upkeep(self) -> list[Coroutine[Any, Any, None]]:
        """What keeps the Reach true, once it was announced."""
        return [self._announcer.keep(self._config.tls_rotate_s)] if self._announcer is not None else []

    async def close(self) -> None:
        await self.peers.close()

    def _relayed(self) -> Callable[..., None]:
        assert self._announcer is not None, "relays take TLS"
        return self._announcer.relayed

    def _own(self) -> bytes | None:
        return self._announcer.sealed if self._announcer is not None else None

    async def _others(self) -> list[Contact]:
        """Relays, and the other nodes of the model that speak TLS: those who may be asked to dial."""
        assert self._model is not None
        serving = await asyncio.to_thread(self._chain.serving, self._model)
        first = [one.contact for one in serving if one.record.node != self._node and one.contact.pins]
        found = await asyncio.gather(*map(self.directory.contact, first), return_exceptions=True)
        for problem in found:
            if isinstance(problem, BaseException) and not isinstance(problem, TallystickError):
                raise problem
        relays = [reach.contact for relay in self._relays if (reach := self.directory.known(relay.node)) is not None]
        return [*relays, *(contact for contact in found if isinstance(contact, Contact))]


def _attach_to(listener: Listener) -> Callable[[socket.socket], Coroutine[Any, Any, None]]:
    return lambda sock: listener.attach(sock, "dialled back")
