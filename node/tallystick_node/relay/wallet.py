"""What a node pays its relays: it counts the bytes itself, and signs vouchers for what it has counted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import Any

from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.errors import BadFrame, BadSignature, InsufficientFunds, Rejected, TallystickError
from tallystick_protocol.frames import Frame, Kind, take
from tallystick_protocol.peer import Channel
from tallystick_protocol.signing import seal, unseal
from tallystick_protocol.types import Address, Wei
from tallystick_protocol.vouchers import Voucher

log = logging.getLogger(__name__)

PAY_EVERY = 8
"""Vouchers in the time that the credit lasts."""

LOST_SHARE = 50
LOST_BYTES = 4 << 20
CLOSE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Terms:
    """A relay's price in token base units per byte, and the bytes that it copies before it is paid."""

    price: Wei
    credit_bytes: int

    @classmethod
    def read(cls, body: dict[str, Any], max_price: Wei, relay: Address) -> Terms:
        """Out of REGISTERED, or of the error that asks for money. Raises BadFrame, Rejected (too dear)."""
        text, credit_bytes = take(body, "price", str)[:40], take(body, "credit_bytes", int)
        if not (text.isascii() and text.isdigit()) or not 0 < credit_bytes < 1 << 40:
            raise BadFrame("the relay's terms are malformed")
        if int(text) > max_price:
            raise Rejected(f"relay {relay} asks {int(text)} per byte, relay_max_price is {max_price}", hop=relay)
        return cls(Wei(int(text)), credit_bytes)

    @property
    def credit(self) -> Wei:
        return Wei(self.price * self.credit_bytes)


class RelayPurse:
    """The node's money for relays: channels from its hot key. Blocking where it touches the chain."""

    def __init__(self, wallet: Wallet, budget: Wei) -> None:
        """wallet: the hot key's. budget: what may be put into each relay's channel in all."""
        self._wallet = wallet
        self._budget = budget
        self._domain = wallet.chain.book.escrow_domain
        self._counted: dict[Address, Wei] = {}

    def fund(self, relay: Address, terms: Terms, owed: Wei) -> None:
        """See that the channel covers what is owed and twice the credit. Raises InsufficientFunds, ChainError."""
        held = self._wallet.chain.funds(self._wallet.address, relay).latest
        wanted = Wei(owed + 2 * terms.credit)
        if held >= wanted:
            return
        if wanted > self._budget:
            raise InsufficientFunds(
                f"the channel to relay {relay} holds {held} and {wanted} are needed, relay_budget is {self._budget}",
                node=relay,
            )
        self._wallet.fund(self._wallet.address, [(relay, Wei(min(4 * wanted, self._budget) - held))])

    def sign(self, relay: Address, total: Wei) -> bytes:
        return seal(self._domain, Voucher(self._wallet.address, relay, total), self._wallet.key)

    def recall(self, relay: Address, owed: Wei, sealed: bytes, terms: Terms) -> tuple[Wei, Wei]:
        """(what this node owes, what it has signed for), from what the relay claims and shows.

        A claim is believed up to one credit beyond what was signed when this process meets the relay first, and later
        up to what it has counted itself and a little more: bytes that a broken connection lost were copied, too.
        Raises BadSignature for a voucher that this node did not sign.
        """
        signed = Wei(0)
        if sealed:
            voucher, signer = unseal(self._domain, Voucher, sealed)
            if (signer, voucher.node, voucher.client) != (self._wallet.address, relay, self._wallet.address):
                raise BadSignature(f"relay {relay} shows a voucher that this node did not sign", hop=relay)
            signed = Wei(voucher.total)
        known = self._counted.get(relay)
        limit = signed + terms.credit if known is None else known + known // LOST_SHARE + LOST_BYTES * terms.price
        base = Wei(max(signed, min(owed, limit)))
        self._counted.setdefault(relay, base)
        return base, signed

    def counted(self, relay: Address, amount: Wei) -> None:
        """So much was counted for a relay beyond what is known."""
        self._counted[relay] = Wei(self._counted[relay] + amount)


class RelayBill:
    """What one registration at a relay comes to; the `Meter` of its connections."""

    def __init__(
        self, purse: RelayPurse, relay: Address, terms: Terms, base: Wei, signed: Wei, channel: Channel
    ) -> None:
        """base: what was owed when it began; signed: what it has vouchers for."""
        self._purse = purse
        self._relay = relay
        self._terms = terms
        self._base = base
        self._signed = signed
        self._channel = channel
        self._paying: asyncio.Task[None] | None = None
        self.num_bytes = 0
        if base > signed:
            self.pay_soon()

    @property
    def is_free(self) -> bool:
        return self._terms.price == 0

    @property
    def total(self) -> Wei:
        return Wei(self._base + self.num_bytes * self._terms.price)

    def count(self, num_bytes: int) -> bool:
        self.num_bytes += num_bytes
        self._purse.counted(self._relay, Wei(num_bytes * self._terms.price))
        if self.total - self._signed >= self._terms.credit // PAY_EVERY:
            self.pay_soon()
        return True

    async def allowed(self) -> None:
        """Nothing ever waits on this side."""

    def pay_soon(self) -> bool:
        """Send a voucher for what has been counted, beside everything else; False when there is nothing to pay."""
        if self.total > self._signed and (self._paying is None or self._paying.done()):
            self._paying = asyncio.create_task(self._pay())
        return self.total > self._signed

    async def close(self) -> None:
        """The last voucher, if the connection still takes it."""
        if self._paying is not None:
            self._paying.cancel()
            await asyncio.gather(self._paying, return_exceptions=True)
        if self.total > self._signed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._pay()

    async def _pay(self) -> None:
        total = self.total
        try:
            await asyncio.to_thread(self._purse.fund, self._relay, self._terms, total)
            await self._channel.send(Frame(Kind.VOUCHER, {"voucher": self._purse.sign(self._relay, total)}))
            self._signed = total
        except TallystickError as error:
            log.warning("relay %s is not paid: %s", self._relay, error)
