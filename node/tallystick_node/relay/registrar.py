"""The relay's control connections: a node registers with its hot key's signature, is called, and pays."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable

from tallystick_node.relay.account import Account, Tariff
from tallystick_node.relay.switchboard import Registration, Switchboard
from tallystick_node.stake import Lookups
from tallystick_node.till import Till
from tallystick_protocol.errors import (
    BadFrame,
    InsufficientFunds,
    Overloaded,
    PaymentRequired,
    Unauthorized,
    Unreachable,
)
from tallystick_protocol.frames import Frame, Kind, take
from tallystick_protocol.messages import CLOCK_SKEW_S, RelayRegister
from tallystick_protocol.peer import Channel, error_frame, sealed_field
from tallystick_protocol.signing import Domain, unseal
from tallystick_protocol.types import Address

log = logging.getLogger(__name__)

NONCES_REMEMBERED = 16384


class Registrar:
    """Answers `/v1/relay`. For one event loop."""

    def __init__(
        self,
        relay: Address,
        domain: Domain,
        switchboard: Switchboard,
        tariff: Tariff,
        till: Till,
        lookups: Lookups,
        is_staked: Callable[[Address], bool],
    ) -> None:
        """is_staked(node): from the chain; blocking."""
        self._relay = relay
        self._domain = domain
        self._switchboard = switchboard
        self._tariff = tariff
        self._till = till
        self._lookups = lookups
        self._is_staked = is_staked
        self._nonces: OrderedDict[bytes, None] = OrderedDict()

    async def serve(self, channel: Channel, first: Frame) -> None:
        """A connection whose first frame is REGISTER, until it ends."""
        claim, signer = unseal(self._domain, RelayRegister, sealed_field(first, "register"))
        if claim.relay != self._relay or claim.spki != channel.spki or abs(claim.issued - time.time()) > CLOCK_SKEW_S:
            raise Unauthorized("the registration is for another relay, another of its keys, or another time")
        self._remember(claim.nonce)
        if await asyncio.to_thread(self._lookups.signer_of, signer) != claim.node:
            raise Unauthorized(f"{signer} does not sign for node {claim.node}")
        if not await asyncio.to_thread(self._is_staked, claim.node):
            raise Unauthorized(f"{claim.node} has no stake: only staked nodes are relayed")
        if not self._switchboard.has_room(claim.node):
            raise Overloaded("this relay takes no more nodes", retry_after_s=600)
        account = Account(signer, self._tariff, self._till, self._lookups, lambda: self._remind(channel))
        try:
            await asyncio.to_thread(account.check_funds)
        except InsufficientFunds as error:
            error.fields.update(self._terms(), node=self._relay)
            raise
        registration = Registration(claim.node, channel, account)
        ledger = self._till.account(signer)
        body = {**self._terms(), "owed": str(ledger.owed), "voucher": ledger.sealed}
        await channel.send(Frame(Kind.REGISTERED, body))
        before = self._switchboard.register(registration)
        if before is not None:
            await before.channel.close()
        log.info("%s is relayed", claim.node)
        try:
            await self._listen(channel, account)
        finally:
            self._switchboard.unregister(registration)
            log.info("%s is relayed no more", claim.node)

    async def _listen(self, channel: Channel, account: Account) -> None:
        while True:
            frame = await channel.receive()
            if frame.kind is not Kind.VOUCHER:
                raise BadFrame("a registered node sends vouchers only")
            await account.accept(take(frame.body, "voucher", bytes))

    def _terms(self) -> dict[str, str | int]:
        return {"price": str(self._tariff.price), "credit_bytes": self._tariff.credit_bytes}

    async def _remind(self, channel: Channel) -> None:
        error = PaymentRequired("bytes wait for a voucher")
        try:
            await channel.send(error_frame(error.code, error.message, error.fields))
        except Unreachable:
            log.debug("the node that should pay is gone")

    def _remember(self, nonce: bytes) -> None:
        """Raises Unauthorized for a registration that was used before."""
        if nonce in self._nonces:
            raise Unauthorized("this registration was used before; sign another one")
        self._nonces[nonce] = None
        while len(self._nonces) > NONCES_REMEMBERED:
            self._nonces.popitem(last=False)
