"""What a node owes its relay: so much per byte that was copied for it, postpaid within a credit, by vouchers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tallystick_node.stake import Lookups
from tallystick_node.till import Funds, Till
from tallystick_protocol.errors import PaymentRequired
from tallystick_protocol.types import Address, Wei

PAY_TIMEOUT_S = 60.0
"""How long bytes wait for a voucher before their connection is cut."""


BURST_S = 1.0
"""How far a node may be ahead of its rate."""


@dataclass(frozen=True, slots=True)
class Tariff:
    """price: token base units per byte, both ways. credit_bytes: copied before they are paid for.

    bytes_per_s: for each node; 0: as fast as it goes.
    """

    price: Wei
    credit_bytes: int
    bytes_per_s: int = 0

    @property
    def credit(self) -> Wei:
        return Wei(self.price * self.credit_bytes)


class Account:
    """One node's account at this relay; the `Meter` of its connections. payer: whose vouchers pay."""

    def __init__(
        self, payer: Address, tariff: Tariff, till: Till, lookups: Lookups, remind: Callable[[], Awaitable[None]]
    ) -> None:
        """remind(): tell the node that its bytes wait for a voucher."""
        self.payer = payer
        self.num_bytes = 0
        self.num_sockets = 0
        self._tariff = tariff
        self._till = till
        self._lookups = lookups
        self._remind = remind
        self._paid = asyncio.Event()
        self._free_at = 0.0

    @property
    def unsigned(self) -> Wei:
        return self._till.account(self.payer).unsigned

    def check_funds(self) -> None:
        """Raises InsufficientFunds unless the channel covers what is owed and the whole credit. Blocking."""
        if self._tariff.price:
            needed = Wei(self._till.account(self.payer).owed + self._tariff.credit)
            funds = self._lookups.funds(self.payer, needed)
            self._till.check_funds(self.payer, self._tariff.credit, funds)

    def count(self, num_bytes: int) -> bool:
        self.num_bytes += num_bytes
        if self._tariff.bytes_per_s:
            self._free_at = max(time.monotonic(), self._free_at) + num_bytes / self._tariff.bytes_per_s
        if self._tariff.price:
            self._till.charge(self.payer, Wei(num_bytes * self._tariff.price))
        return self._is_paid and self._ahead_s <= BURST_S

    @property
    def _is_paid(self) -> bool:
        return not self._tariff.price or self.unsigned <= self._tariff.credit

    @property
    def _ahead_s(self) -> float:
        return self._free_at - time.monotonic()

    async def allowed(self) -> None:
        """Raises PaymentRequired when no voucher comes."""
        while (ahead_s := self._ahead_s) > BURST_S:
            await asyncio.sleep(ahead_s - BURST_S)
        if not self._is_paid:
            await self._wait_for_voucher()

    async def _wait_for_voucher(self) -> None:
        self._paid.clear()
        await self._remind()
        try:
            async with asyncio.timeout(PAY_TIMEOUT_S):
                while not self._is_paid:
                    await self._paid.wait()
                    self._paid.clear()
        except TimeoutError:
            raise PaymentRequired("nothing more is copied before a voucher comes") from None

    async def accept(self, sealed: bytes) -> None:
        """Take a voucher. Raises BadSignature, BadVoucher, InsufficientFunds, ChainError."""
        await asyncio.to_thread(self._accept, sealed)
        self._paid.set()

    def _accept(self, sealed: bytes) -> None:
        account = self._till.account(self.payer)
        funds: Funds = self._lookups.funds(self.payer, Wei(account.owed + self._tariff.credit))
        self._till.accept(sealed, self.payer, funds, int(time.time()))
