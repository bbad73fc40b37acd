"""Which windows of a session may be signed, in which order, and what the receipt says: a pure state machine.

A window is signed when its rows are complete (or at `flush`), when the window before it stands complete, and when the
previous hop has signed an output equal to this hop's input. Every re-signing raises the revision.

Where sketches are in use a receipt says which challenge to the receipt before it was answered, and how: so the next
window waits for that answer, and behind the last one a closing receipt over the same rows carries the last answer.
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


@dataclass(frozen=True, slots=True)
class Answer:
    """What was answered to a challenge: the root over the sketches."""

    challenge: bytes
    sketches: Digest


_NONE = Answer(ZERO32, ZERO32)


class Windows:
    """The standing receipts of one session at one hop.

    answers: by digest of the receipt that was challenged; None where sketches are not in use.
    """

    def __init__(self, terms: Terms, record: Record, sketches: bool = False) -> None:
        self.terms = terms
        self.side = Side()
        self._record = record
        self._standing: list[Receipt] = []
        self._digests: list[Digest] = []
        self._upstream: dict[int, Receipt] = {}
        self._ever_signed: set[int] = set()
        self._flush_to = 0
        self._revision = 0
        self.answers: dict[Digest, Answer] | None = {} if sketches else None
        self._closed: Digest | None = None

    def find(self, digest: Digest) -> Receipt | None:
        """The standing receipt with this digest."""
        return self._standing[self._digests.index(digest)] if digest in self._digests else None

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
        if self.answers is not None:
            self.answers = {digest: self.answers[digest] for digest in self._digests if digest in self.answers}

    def may_be_due(self, first: int) -> bool:
        """Whether rows from position `first` on, which are there now, may have made a window due."""
        length = len(self._record)
        return length // WINDOW > first // WINDOW or self._flush_to == length

    def next_unsigned(self, now: int) -> Receipt | None:
        """The next receipt that may be signed, or None. Raises LinkMismatch when the previous hop signed other rows.

        now: unix seconds.
        """
        index = self._next_index()
        if index is None:
            return self._closing(now)
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
        previous = self._digests[index - 1] if index else ZERO32
        answer = _NONE if self.answers is None or not index else self.answers.get(previous)
        if answer is None:
            return None
        terms = self.terms
        context = Context(terms.numerics, terms.wire, terms.top_k, claim.want, self.side.token_types, self.side.memory)
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
            previous=previous,
            challenge=answer.challenge,
            sketches=answer.sketches,
            at=now,
        )

    def _closing(self, now: int) -> Receipt | None:
        """Once everything is flushed and the last window's challenge answered: its receipt again, over that answer."""
        if not self.answers or not self._standing or self._flush_to != len(self._record):
            return None
        last, digest = self._standing[-1], self._digests[-1]
        answer = self.answers.get(digest)
        if answer is None or self._closed == digest or last.last != len(self._record):
            return None
        return replace(
            last,
            revision=self._revision + 1,
            previous=digest,
            challenge=answer.challenge,
            sketches=answer.sketches,
            at=now,
        )

    def is_closing(self, receipt: Receipt) -> bool:
        """Whether a receipt closes the last window that stands: it names that very window's as the one before."""
        return (
            bool(self._digests) and receipt.previous == self._digests[-1] and receipt.first == self._standing[-1].first
        )

    def signed(self, receipt: Receipt, index: int, digest: Digest) -> None:
        """`receipt` for window `index`, as `next_unsigned` gave it, is in the journal: it stands now."""
        self._revision = receipt.revision
        if self.is_closing(receipt):
            self._closed = Digest(receipt.previous)
            return
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
