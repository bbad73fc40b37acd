"""Nodes that break the protocol: each is a function that bends one session of an honest node, when it is opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from tallystick_model.segments import Segment
from tallystick_model.span import SpanModel
from tallystick_node.session import registry
from tallystick_node.session.downstream import step_frames
from tallystick_node.session.hop import Hop
from tallystick_node.session.links import Link
from tallystick_node.session.record import Claim
from tallystick_protocol.errors import Rejected
from tallystick_protocol.frames import Frame, Kind
from tallystick_protocol.peer import Channel, sealed_field
from tallystick_protocol.receipts import Receipt, rows_root
from tallystick_protocol.signing import keccak, seal, unseal
from tallystick_protocol.types import ZERO_ADDRESS, Positions, Wei, window_of

Bend = Callable[[Hop], None]

ERROR = 1e-3
"""Of the values of those that lie about rows."""


@dataclass(frozen=True, slots=True)
class Breaking:
    """what: in a few words. bend(session): from now on it breaks the protocol."""

    what: str
    bend: Bend


@contextmanager
def bending(choose: Callable[[Hop], Bend | None]) -> Iterator[None]:
    """While held, sessions that nodes of this process open are bent as `choose` says, right after they are made."""
    honest = registry.Hop

    class Bent(honest):  # type: ignore[misc,valid-type]
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            if (bend := choose(self)) is not None:
                bend(self)

    vars(registry)["Hop"] = Bent
    try:
        yield
    finally:
        vars(registry)["Hop"] = honest


# Receipts


def forged(hop: Hop, sealed: bytes, output: Callable[[Receipt], bytes] = lambda one: keccak(one.output)) -> bytes:
    """Another output for the same window and revision, signed behind the journal's back."""
    receipt, _ = unseal(hop.shop.domain, Receipt, sealed)
    return seal(hop.shop.domain, replace(receipt, output=output(receipt)), hop.shop.journal._key)


def copies_receipts(hop: Hop) -> None:
    """Shows the receipts of the hop before as its own."""
    hear, frame, heard = hop.signer.hear, hop.signer.frame, list[bytes]()

    async def listen(channel: Channel | None, told: Frame, epoch: int) -> None:
        heard.append(sealed_field(told, "receipt"))
        await hear(channel, told, epoch)

    hop.signer.hear = listen  # type: ignore[method-assign]
    hop.signer.frame = lambda sealed: frame(heard[-1] if heard else sealed)  # type: ignore[method-assign]


def copies_roots(hop: Hop) -> None:
    """Signs what the hop before has signed: nothing was computed for it."""

    def copied(receipt: Receipt) -> Receipt:
        heard = hop.windows._upstream[window_of(receipt.first)]
        return replace(receipt, input=heard.input, output=heard.output)

    signing(hop, copied)


def complains(hop: Hop) -> None:
    """Says of whoever comes before it that rows and receipts do not agree."""

    def lie(_: int, claim: Claim) -> Claim:
        return replace(claim, input=keccak(claim.input))

    claiming(hop, lie)


def signing(hop: Hop, lie: Callable[[Receipt], Receipt]) -> None:
    """What the session signs is `lie` of what it would sign, and nothing is checked any more."""
    next_unsigned = hop.windows.next_unsigned

    def next_lie(now: int) -> Receipt | None:
        receipt = next_unsigned(now)
        return None if receipt is None else lie(receipt)

    hop.windows.next_unsigned = next_lie  # type: ignore[method-assign]


def claiming(hop: Hop, lie: Callable[[int, Claim], Claim]) -> None:
    """What the session takes for the truth about a window is `lie` of it."""
    claim = hop.record.claim
    hop.record.claim = lambda index: lie(index, claim(index))  # type: ignore[method-assign]


def equivocates(hop: Hop) -> None:
    """Signs two outputs for every window, and sends the client both."""
    send = hop.control.send

    async def send_both(frame: Frame) -> None:
        await send(frame)
        if frame.kind is Kind.RECEIPT:
            await send(hop.signer.frame(forged(hop, frame.body["receipt"])))

    hop.control.send = send_both  # type: ignore[method-assign]


def two_faced(hop: Hop) -> None:
    """Signs one output for the client and another one for the next hop."""
    tell = hop.downstream.pass_receipt

    async def tell_otherwise(sealed: bytes) -> None:
        await tell(forged(hop, sealed))

    hop.downstream.pass_receipt = tell_otherwise  # type: ignore[method-assign]


def claims_other_input(hop: Hop) -> None:
    """Signs for rows that it did not get; the hop before has signed others."""
    signing(hop, lambda receipt: replace(receipt, input=keccak(receipt.input)))


# Money


def overcharges(hop: Hop) -> None:
    """Claims a hundred times its credit for sessions that never were."""
    credit = hop.shop.till._credit
    hop.shop.till.charge(hop.client, Wei(100 * credit))


def charges_thrice(hop: Hop) -> None:
    """Takes three times the price that it offered."""
    cost = hop.steps._cost
    hop.steps._cost = lambda rows: Wei(3 * cost(rows))  # type: ignore[method-assign]


def withholds(hop: Hop) -> None:
    """Computes nothing more once it was paid, and says that all is well."""
    take_voucher, take = hop.billing.take_voucher, hop.steps.take
    is_paid = False

    async def pocket(sealed: bytes, now: int) -> None:
        nonlocal is_paid
        await take_voucher(sealed, now)
        is_paid = True

    async def take_unless_paid(channel: Channel | None, frame: Frame, epoch: int) -> None:
        if not is_paid:
            await take(channel, frame, epoch)

    hop.billing.take_voucher = pocket  # type: ignore[method-assign]
    hop.steps.take = take_unless_paid  # type: ignore[method-assign]


# Audits


def refuses_audits(hop: Hop) -> None:
    """Does not give the rows that it sent on to whoever recomputes the next hop."""

    async def refuse(_: Frame) -> None:
        raise Rejected("not today", hop=hop.shop.node)

    hop._on_replay = refuse  # type: ignore[method-assign]


def is_audit(hop: Hop) -> bool:
    """Whether a session in the middle of a model looks like an audit: nobody comes after it."""
    return hop.opened.next == ZERO_ADDRESS and not hop.rows.is_last


def right_for_audits(hop: Hop) -> None:
    """Wrong by a thousandth, but in what it takes for an audit."""
    outputs = hop.rows.outputs
    if not is_audit(hop):
        hop.rows.outputs = lambda result, want: outputs(result * (1 + ERROR), want)  # type: ignore[method-assign]


class Echo:
    """An engine that returns what it was given, and computes nothing."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def forward(self, segment: Segment, *_: Any, model: SpanModel, **__: Any) -> torch.Tensor:
        if model.is_last:
            wanted = len(segment) if segment.wanted is None else len(segment.wanted)
            return torch.zeros(wanted, model.manifest.vocab)
        return torch.ones(len(segment), model.manifest.width) if model.is_first else segment.rows


def lazy(hop: Hop) -> None:
    """Signs without computing: what comes in goes out."""
    hop.shop = replace(hop.shop, engine=Echo(hop.shop.engine))  # type: ignore[arg-type]


def lies(hop: Hop) -> None:
    """Computes, and signs something else."""
    claiming(hop, lambda _, claim: replace(claim, output=keccak(claim.output)))


# Neighbours that collude


def sends_others(hop: Hop, stubborn: bool = False) -> None:
    """Signs what it should have computed, and sends the next hop other rows; the true ones to auditors, or not."""
    downstream, record, send = hop.downstream, hop.record, hop.downstream._send

    async def send_others(link: Link, positions: Positions) -> None:
        if link is not downstream._link and not stubborn:
            await send(link, positions)
            return
        outputs, want = record.outputs(positions)
        for frame in step_frames(downstream._dtype, positions.first, [altered(row) for row in outputs], want):
            await downstream._give(link, frame)

    downstream._send = send_others  # type: ignore[method-assign]


def altered(row: bytes) -> bytes:
    """A hidden row, a little longer."""
    return (np.frombuffer(row, dtype="<f4") * np.float32(1 + ERROR)).tobytes()


def frames(hop: Hop) -> None:
    """Sends the next hop other rows, with another receipt over them than the client has: as if that one had changed
    them."""
    sends_others(hop)
    downstream, record, give = hop.downstream, hop.record, hop.downstream._give

    def root(receipt: Receipt) -> bytes:
        return rows_root(altered(row) for row in record.outputs(receipt.positions)[0])

    async def give_forged(link: Link, frame: Frame) -> None:
        if link is downstream._link and frame.kind is Kind.RECEIPT:
            frame = replace(frame, body={"receipt": forged(hop, frame.body["receipt"], root)})
        await give(link, frame)

    downstream._give = give_forged  # type: ignore[method-assign]


def vouches(hop: Hop) -> None:
    """Signs to have got what the hop before has signed, whatever came."""

    def vouched(index: int, claim: Claim) -> Claim:
        heard = hop.windows._upstream.get(index)
        return claim if heard is None else replace(claim, input=heard.output)

    claiming(hop, vouched)


BREAKING: dict[str, Breaking] = {
    "copied_receipts": Breaking("another node's receipts shown as its own", copies_receipts),
    "copied_roots": Breaking("another node's claim signed as its own", copies_roots),
    "equivocating": Breaking("two receipts for one window", equivocates),
    "two_faced": Breaking("one receipt for the client, another one for the next hop", two_faced),
    "other_input": Breaking("signs for an input it did not get", claims_other_input),
    "complaining": Breaking("says that its neighbours send wrong rows", complains),
    "overcharging": Breaking("claims debts that never were", overcharges),
    "charging_thrice": Breaking("takes three times its price", charges_thrice),
    "withholding": Breaking("stops once it was paid", withholds),
    "refusing_audits": Breaking("does not give its rows for an audit", refuses_audits),
    "right_for_audits": Breaking("right for audits, wrong for users", right_for_audits),
    "lazy_auditor": Breaking("an auditor that signs without computing", lazy),
    "lying_auditor": Breaking("an auditor that signs something else", lies),
    "framing": Breaking("other rows, and another receipt, for the next hop than for the client", frames),
    "colluding_liar": Breaking("sends the next hop other rows than it signs for", sends_others),
    "stubborn_liar": Breaking("the same, to auditors, too", partial(sends_others, stubborn=True)),
    "colluding_voucher": Breaking("signs to have got what it did not", vouches),
}
