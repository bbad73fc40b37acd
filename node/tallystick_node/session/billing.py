"""What one session costs its client: steps are charged as they come, vouchers taken, waited for where credit ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from tallystick_node.stake import Lookups
from tallystick_node.till import Funds, Till
from tallystick_protocol.errors import InsufficientFunds, PaymentRequired, TallystickError
from tallystick_protocol.signing import Domain, unseal
from tallystick_protocol.types import Address, Wei
from tallystick_protocol.vouchers import Voucher

PAYMENT_TIMEOUT_S = 60.0
FUNDS_TIMEOUT_S = 45.0
"""For money in the channel: less than a client waits for anything at all."""

FUNDS_POLL_S = 5.0
"""How often a channel that does not hold enough is read again; a voucher has it read at once."""


class Billing:
    """One session's side of its client's ledger, which all sessions of that client share.

    charged_at: when something was charged last, or the session began.
    """

    def __init__(
        self,
        till: Till,
        lookups: Lookups,
        waiting: dict[Address, set[asyncio.Event]],
        client: Address,
        escrow_domain: Domain,
        tell: Callable[[TallystickError], Awaitable[None]],
        begun: Callable[[], Wei] = lambda: Wei(0),
    ) -> None:
        """waiting: the sessions of each client that wait for a voucher. tell: says to the client what is missing.

        begun: what the windows that the client's sessions have begun may come to. It goes on top of the credit: nobody
        pays for a window before it is complete, and sessions side by side would wait for each other.
        """
        self._till = till
        self._lookups = lookups
        self._waiting = waiting
        self._client = client
        self._escrow_domain = escrow_domain
        self._tell = tell
        self._begun = begun
        self._paid = asyncio.Event()
        self.charged_at = time.monotonic()

    @property
    def is_waiting(self) -> bool:
        """Whether a step waits for a voucher, or for money in the channel."""
        return self._paid in self._waiting.get(self._client, ())

    async def book(self, cost: Wei, is_void: Callable[[], bool], waits: bool = True) -> bool:
        """Charge a step as soon as it is within credit and the channel holds it; False when it is void by then.

        It is charged before it is computed: a client's sessions side by side share one credit. waits: whether the
        client has time to fund its channel. Raises PaymentRequired, InsufficientFunds.
        """
        till, until = self._till, 0.0
        while True:
            if not self._has_credit(cost):
                await self._wait_for_voucher(cost, is_void)
            funds = await self._funds(Wei(till.account(self._client).owed + cost))
            if is_void():
                return False
            if not self._has_credit(cost):
                continue
            try:
                till.check_funds(self._client, cost, funds)
                break
            except InsufficientFunds as short:
                if not waits:
                    raise
                until = await self._wait_for_funds(short, until)
        till.charge(self._client, cost)
        self.charged_at = time.monotonic()
        return True

    def _has_credit(self, cost: Wei) -> bool:
        return self._till.has_credit(self._client, cost, self._begun())

    def refund(self, cost: Wei) -> None:
        """A step that was charged and not computed."""
        self._till.charge(self._client, Wei(-cost))
        self._wake_all()

    def wake(self) -> None:
        """What this session's step waits for may have become void."""
        self._paid.set()

    async def take_voucher(self, sealed: bytes, now: int) -> None:
        """A voucher from the client; unix seconds. Raises what `Till.accept` raises."""
        voucher, _ = unseal(self._escrow_domain, Voucher, sealed)
        funds = await self._funds(Wei(voucher.total))
        await asyncio.to_thread(self._till.accept, sealed, self._client, funds, now)
        self._wake_all()

    async def _wait_for_voucher(self, cost: Wei, is_void: Callable[[], bool]) -> None:
        till = self._till
        account = till.account(self._client)
        due = PaymentRequired(
            f"{account.unsigned} is owed and not yet signed for: send a voucher",
            owed=str(account.owed),
            signed=str(account.signed),
        )
        try:
            with self._in_line():
                await self._tell(due)
                async with asyncio.timeout(PAYMENT_TIMEOUT_S):
                    while not self._has_credit(cost) and not is_void():
                        await self._paid.wait()
                        self._paid.clear()
        except TimeoutError:
            raise due from None

    async def _wait_for_funds(self, short: InsufficientFunds, until: float) -> float:
        """Wait until the channel is worth another look. until: when to give up; 0.0 at first, when the client is told.

        Returns it. Raises `short` when it has come.
        """
        now = time.monotonic()
        if until and now > until:
            raise short
        with self._in_line():
            if not until:
                await self._tell(InsufficientFunds(short.message, **{**short.fields, "waits": True}))
            try:
                async with asyncio.timeout(FUNDS_POLL_S):
                    await self._paid.wait()
            except TimeoutError:
                pass
        return until or now + FUNDS_TIMEOUT_S

    @contextmanager
    def _in_line(self) -> Iterator[None]:
        """While held, `_paid` is set whenever something comes from the client."""
        waiting = self._waiting.setdefault(self._client, set())
        waiting.add(self._paid)
        self._paid.clear()
        try:
            yield
        finally:
            waiting.discard(self._paid)
            if not waiting:
                self._waiting.pop(self._client, None)

    def _wake_all(self) -> None:
        for paid in self._waiting.get(self._client, ()):
            paid.set()

    async def _funds(self, at_least: Wei) -> Funds:
        """The client's channel, from memory if that will do."""
        known = self._lookups.remembered(self._client, at_least)
        if known is not None:
            return known
        return await asyncio.to_thread(self._lookups.funds, self._client, at_least)
