"""The receipts of one session: what the previous hop has signed, what is due, signed once and sent."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tallystick_protocol.errors import BadSignature, Unauthorized
from tallystick_protocol.frames import Frame, Kind
from tallystick_protocol.peer import Channel, sealed_field
from tallystick_protocol.receipts import Receipt
from tallystick_protocol.signing import unseal
from tallystick_protocol.types import window_of

if TYPE_CHECKING:
    from tallystick_node.session.hop import Hop


class Signer:
    """Signs windows. lock: held while it does, and while what it signs is changed. sealed: what stands, by window.

    closing: the receipt that carries the last window's sketches, once it is signed.
    """

    def __init__(self, hop: Hop) -> None:
        self.lock = asyncio.Lock()
        self.sealed: dict[int, bytes] = {}
        self.closing: bytes | None = None
        self._due = asyncio.Event()
        self._hop = hop

    async def hear(self, channel: Channel | None, frame: Frame, epoch: int) -> None:
        """The previous hop's receipt: it signed what it sent, or we do not sign what we got."""
        hop = self._hop
        if not hop.inbox.is_push(channel):
            raise Unauthorized("receipts come from the previous hop")
        receipt, signer = unseal(hop.shop.domain, Receipt, sealed_field(frame, "receipt"))
        node = await asyncio.to_thread(hop.shop.lookups.signer_of, signer)
        if node != hop.previous or receipt.node != hop.previous:
            raise BadSignature("the receipt is not signed by the previous hop", hop=hop.previous)
        if receipt.model != hop.shop.model or receipt.end != hop.model.span.start:
            raise BadSignature("the receipt is for another model or other layers", hop=hop.previous)
        hop.steps.check_length(receipt.last)
        if receipt.last > hop.inbox.kept_of(epoch):
            return
        hop.windows.hear(receipt, 0 if hop.one_shot else window_of(receipt.first))
        self._due.set()

    def wake(self) -> None:
        """Something may have become due."""
        self._due.set()

    async def run(self) -> None:
        """Sign as windows become due."""
        hop = self._hop
        while True:
            await self._due.wait()
            self._due.clear()
            async with self.lock:
                await hop.report(self.sign_due())

    async def sign_due(self) -> None:
        """Sign what is due now. Holds `lock`. Raises LinkMismatch, Equivocation."""
        hop = self._hop
        shop = hop.shop
        while (receipt := hop.windows.next_unsigned(int(shop.clock()))) is not None:
            if not hop.fed_by.may_sign(receipt.last):
                return
            index = 0 if hop.one_shot else window_of(receipt.first)
            sealed = await asyncio.to_thread(shop.journal.sign, receipt)
            standing, _ = unseal(shop.domain, Receipt, sealed)  # the journal may have had it, with its old time
            closes = hop.windows.is_closing(standing)
            hop.windows.signed(standing, index, shop.journal.digest_of(standing))
            self.closing = sealed if closes else None
            if not closes:
                self.sealed[index] = sealed
            await asyncio.to_thread(shop.till.settle, hop.client, int(shop.clock()))
            await hop.control.send(self.frame(sealed))
            if not closes:  # the next hop has heard of these rows
                await hop.downstream.pass_receipt(sealed)

    def frame(self, sealed: bytes) -> Frame:
        """A receipt for the client."""
        hop = self._hop
        return Frame(Kind.RECEIPT, {"receipt": sealed, "epoch": hop.inbox.epoch})

    def missing(self, num_windows: int) -> list[Frame]:
        """What a client lacks that has the receipts of so many windows."""
        due = [self.sealed[at] for at in sorted(self.sealed) if at >= num_windows]
        return [self.frame(sealed) for sealed in (*due, *([self.closing] if self.closing is not None else []))]

    async def flush(self, frame: Frame) -> None:
        """FLUSH."""
        hop = self._hop
        hop.windows.flush(frame.position)
        self._due.set()
