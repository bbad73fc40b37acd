"""A node's sign of life on chain: once an epoch while it serves, so that nobody can jail it (docs/contracts.md)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from tallystick_node.config import NodeConfig
from tallystick_protocol.chain.book import load_book
from tallystick_protocol.chain.reads import Chain, NodeRecord
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.errors import BadMessage, ChainError, ConfigError
from tallystick_protocol.signing import Key, address_bytes, checksum_address
from tallystick_protocol.types import Address

log = logging.getLogger(__name__)

LOOK_S = 1800.0
"""Between two looks at most, and an eighth of an epoch: a chain's clock is not this machine's. A look is two reads."""


class Heartbeat:
    """Beats for one node. All that it has to know is on chain, so a restart is no case of its own."""

    def __init__(self, wallet: Wallet, node: Address, pause_s: float = 1.0) -> None:
        """wallet: of the node or a hot key of it; pays the gas of a beat a day. pause_s: before the first look."""
        self._wallet, self._chain, self._node = wallet, wallet.chain, node
        self._terms: tuple[int, int] | None = None
        self._pause_s = pause_s
        self.seen_at: int | None = None
        """When the chain has seen the node last, unix seconds; None until that is known."""

    async def run(self, serves: Callable[[], bool]) -> None:
        """Look again and again until cancelled; only a node that serves beats."""
        pause_s = self._pause_s
        while True:
            await asyncio.sleep(pause_s)
            if not serves():
                continue
            try:
                pause_s = await asyncio.to_thread(self.look)
            except ChainError as error:
                pause_s = 180 * self._pause_s
                log.warning("no beat for now; two days of silence mean jail: %s", error)

    def look(self) -> float:
        """Beat if it is due. Returns the seconds until the next look. Blocking. Raises ChainError."""
        epoch, stale = self._terms = self._terms or self._chain.beating()
        record, now = self._see(), self._chain.now()
        if record.jailed or now >= record.seen_at + epoch:
            self._wallet.beat()
            record = self._see()
            log.info("beat%s", "" if now < record.seen_at + stale else ", late")
        return max(1.0, min(record.seen_at + epoch - now, epoch / 8, LOOK_S))

    def leave_jail(self) -> None:
        """Beat if the node is in jail, where no client looks for it. Blocking. Raises ChainError."""
        if self._see().jailed:
            self._wallet.beat()
            self._see()
            log.warning("this node was in jail, for it had been silent; it is free again")

    def _see(self) -> NodeRecord:
        record = self._chain.node(self._node)
        self.seen_at = record.seen_at
        return record


def jail(config: NodeConfig, key: Key, text: str) -> str:
    """Jail a node; returns a sentence about it. key: pays the gas. Raises ConfigError, ChainError saying why not."""
    try:
        node = checksum_address(address_bytes(Address(text)))
    except BadMessage as error:
        raise ConfigError(error.message) from None
    chain = Chain(config.rpc, load_book(config.book))
    chain.check()
    record, stale, now = chain.node(node), chain.beating()[1], chain.now()
    if record.span is None:
        raise ConfigError(f"{node} serves nothing")
    if record.jailed:
        raise ConfigError(f"{node} is in jail already")
    if now < record.seen_at + stale:
        silent = now - record.seen_at
        raise ConfigError(f"{node} was seen on chain {silent} s ago; only after {stale} s of silence can it be jailed")
    Wallet(chain, key).jail(node)
    return f"{node} is in jail until it beats; it was seen last {now - record.seen_at} s ago"
