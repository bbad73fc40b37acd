"""Which windows of a session may be signed, in which order, and what the receipt says: a pure state machine.

A window is signed when its rows are complete (or at `flush`), when the window before it stands complete, and when the
previous hop has signed an output equal to this hop's input. Every re-signing raises the revision.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tallystick_node.session.record import Record
from tallystick_protocol.errors import LinkMismatch
from tallystick_protocol.receipts import Context, Receipt
from tallystick_protocol.types import WINDOW, ZERO32, ZERO_ADDRESS, Address, Digest, ModelId, SessionId, Span
from tallystick_protocol.wire import Wire


@dataclass(frozen=True, slots=True)
class Terms:
    """What is the same in all receipts of a session at this hop."""

    node: Address
    model: ModelId
    numeric_class: Digest
    session: SessionId
    attempt: int
    span: Span
    previous: Address
    top_k: int
    numerics: str
    wire: Wire


@dataclass(frozen=True, slots=True)
class Side:
    """Roots over what the outputs depend on besides the rows: token types, and the encoder's states of a decoder."""

    token_types: Digest | None = None
    memory: Digest | None = None


class Windows:
    """The standing receipts of one session at one hop."""

    def __init__(self, terms: Terms, record: Record) -> None:
        self.terms = terms
        self.side = Side()
        self._record = record
        self._standing: list[Receipt] = []
        self._digests: list[Digest] = []
        self._upstream: dict[int, Receipt] = {}
        self._ever_signed: set[int] = set()
        self._flush_to = 0
        self._revision = 0

    def hear(self, upstream: Receipt, index: int) -> None:
        """The previous hop's receipt for window `index`; a newer revision replaces an older one."""
        before = self._upstream.get(index)
        if before is None or (upstream.attempt, upstream.revision) >= (before.attempt, before.revision):
            self._upstream[index] = upstream

    def replace_previous(self, previous: Address) -> None:
        """Another node pushes from now on; what the old one signed for unsigned windows no longer counts."""
        self.terms = replace(self.terms, previous=previous)
        self._upstream = {}

    def flush(self, length: int) -> None:
        """Sign everything up to `length` positions, complete or not, as soon as exactly so many are there."""
        self._flush_to = length

    def crop(self, length: int) -> None:
        """Positions from `length` on were taken back, of which the record may not have had all that stay: drop receipts
        of rows that it no longer has. Heard ones may come again with another revision."""
        keep = self._record.num_complete
        del self._standing[keep:], self._digests[keep:]
        self._upstream = {index: heard for index, heard in self._upstream.items() if index < length // WINDOW}
        self._flush_to = 0

    def next_unsigned(self, now: int) -> Receipt | None:
        """The next receipt that may be signed, or None. Raises LinkMismatch when the previous hop signed other rows.

        now: unix seconds.
        """
        index = self._next_index()
        if index is None:
            return None
        claim = self._record.claim(index)
        if self.terms.previous != ZERO_ADDRESS:
            heard = self._upstream.get(index)
            if heard is None or heard.positions != claim.positions:
                return None
            if heard.output != claim.input:
                raise LinkMismatch(
                    f"positions {claim.positions}: {self.terms.previous} signed other rows than it sent",
                    hop=self.terms.previous,
                    first=claim.positions.first,
                    last=claim.positions.last,
                )
        terms = self.terms
        context = Context(
            terms.numerics, terms.wire, terms.top_k, claim.want, self.side.token_types, self.side.memory
        )
        return Receipt(
            node=terms.node,
            model=terms.model,
            numeric_class=terms.numeric_class,
            session=terms.session,
            attempt=terms.attempt,
            start=terms.span.start,
            end=terms.span.end,
            first=claim.positions.first,
            last=claim.positions.last,
            revision=self._revision + (index in self._ever_signed),
            context=context.digest(),
            input=claim.input,
            output=claim.output,
            previous=self._digests[index - 1] if index else ZERO32,
            challenge=ZERO32,
            sketches=ZERO32,
            at=now,
        )

    def signed(self, receipt: Receipt, index: int, digest: Digest) -> None:
        """`receipt` for window `index`, as `next_unsigned` gave it, is in the journal: it stands now."""
        self._revision = receipt.revision
        self._ever_signed.add(index)
        del self._standing[index:], self._digests[index:]
        self._standing.append(receipt)
        self._digests.append(digest)

    def _next_index(self) -> int | None:
        """The first window without a standing receipt over all the rows that are due."""
        record = self._record
        index = len(self._standing)
        if index and self._standing[-1].positions != record.window(index - 1):
            index -= 1
        due = record.num_windows if self._flush_to == len(record) else record.num_complete
        return index if index < due else None
