"""The node's own dealings with the chain: join, look up, redeem."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tallystick_node.till import Funds, Till
from tallystick_protocol.chain.reads import Chain
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.errors import ChainError, ConfigError
from tallystick_protocol.signing import SIGNATURE_BYTES, Key
from tallystick_protocol.transport.contact import Contact
from tallystick_protocol.types import Address, ModelId, Span, Wei

log = logging.getLogger(__name__)

FUNDS_AGE_S = 30.0
"""An exit takes days to mature and is seen within this; money that comes is looked for when it is missed."""

SIGNER_AGE_S = 60.0


@dataclass(frozen=True, slots=True)
class Registration:
    """What a node tells the chain of itself."""

    model: ModelId
    span: Span
    price: Wei
    contact: Contact
    operator: Address


def enroll(wallet: Wallet, hot: Key, stake: Wei, payee: Address) -> None:
    """Stake, bind the hot key, set the payee: each only if the chain does not say so already.

    wallet: the cold key's. Raises ChainError, ConfigError naming what is missing.
    """
    chain, node = wallet.chain, wallet.address
    record = chain.node(node)
    minimum = chain.min_stake()
    if stake < minimum:
        raise ConfigError(f"stake = {stake} is below the contract's minimum of {minimum}")
    bound = chain.node_of(hot.address)
    if bound not in (None, node):
        raise ConfigError(f"the hot key {hot.address} belongs to node {bound} for ever; make a new one")
    if record.active < stake:
        missing = Wei(stake - record.active)
        have = chain.balance(node)
        if have < missing:
            raise ChainError(
                f"{node} holds {have} token units and needs {missing} more for its stake; get tokens first"
            )
        wallet.stake(node, missing)
        log.info("staked %d", missing)
    if bound is None:
        wallet.bind(hot)
        log.info("bound the hot key %s", hot.address)
    if record.payee != payee:
        wallet.send("setting the payee", chain.staking.functions.setPayee(payee))


def register(wallet: Wallet, registration: Registration) -> None:
    """Put on chain what the node serves, for how much, and where. wallet: the cold key's. Raises ChainError."""
    wallet.serve(registration.model, registration.span, registration.price, registration.contact, registration.operator)
    log.info("registered layers %s of 0x%s", registration.span, registration.model.hex()[:12])


class Lookups:
    """Chain reads that sessions need, remembered for a moment. Blocking; safe from several threads."""

    def __init__(self, chain: Chain, node: Address, clock: Callable[[], float] = time.monotonic) -> None:
        self._chain = chain
        self._node = node
        self._clock = clock
        self._lock = threading.Lock()
        self._funds: dict[Address, tuple[float, Funds]] = {}
        self._signers: dict[Address, tuple[float, Address | None]] = {}

    def remembered(self, client: Address, at_least: Wei) -> Funds | None:
        """The client's channel if what is remembered is fresh and confirms this much. Does not block."""
        with self._lock:
            known = self._funds.get(client)
        fresh = known is not None and self._clock() - known[0] < FUNDS_AGE_S and known[1].confirmed >= at_least
        return known[1] if known is not None and fresh else None

    def funds(self, client: Address, at_least: Wei) -> Funds:
        """The client's channel; read anew when what is remembered is old, or confirms less than `at_least`."""
        if (known := self.remembered(client, at_least)) is not None:
            return known
        found = self._chain.funds(client, self._node)
        funds = Funds(found.confirmed, found.latest, found.paid)
        with self._lock:
            self._funds[client] = (self._clock(), funds)
        return funds

    def signer_of(self, signer: Address) -> Address | None:
        """The node a hot key signs for. Only answers that can never change are kept long: a binding is for ever."""
        with self._lock:
            known = self._signers.get(signer)
        if known is not None and (known[1] is not None or self._clock() - known[0] < SIGNER_AGE_S):
            return known[1]
        node = self._chain.node_of(signer)
        with self._lock:
            self._signers[signer] = (self._clock(), node)
        return node


class Redeemer:
    """Turns vouchers into tokens, when they are old enough or the node stops."""

    def __init__(self, wallet: Wallet, node: Address, till: Till) -> None:
        """wallet: whoever pays the gas; the money goes to the node's payee whoever calls."""
        self._wallet = wallet
        self._node = node
        self._till = till
        self._lock = threading.Lock()

    def redeem(self) -> Wei:
        """Redeem what the channels hold beyond what was paid. Returns what left the channels, fee included."""
        with self._lock:
            due = []
            for client, total, sealed in self._till.redeemable():
                funds = self._wallet.chain.funds(client, self._node)
                if min(total, funds.latest) > funds.paid:
                    due.append((client, total, sealed[-SIGNATURE_BYTES:]))
            if not due:
                return Wei(0)
            amount = self._wallet.redeem(self._node, due)
            log.info("redeemed %d from %d clients", amount, len(due))
            return amount
