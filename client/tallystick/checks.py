"""What a client demands of a receipt before it pays: pure functions over receipts and the rows that it knows itself."""

from __future__ import annotations

from dataclasses import dataclass

from tallystick_protocol.errors import CorruptResult, LinkMismatch
from tallystick_protocol.messages import CLOCK_SKEW_S
from tallystick_protocol.receipts import Context, Receipt, leaf, merkle_root
from tallystick_protocol.types import ZERO32, Address, Digest, ModelId, SessionId, Span


@dataclass(frozen=True, slots=True)
class Terms:
    """What every receipt of one hop in one session must say."""

    node: Address
    model: ModelId
    numeric_class: bytes
    session: SessionId
    attempt: int
    span: Span


class SignedOnce:
    """What one hop has signed in one session: a window has one claim for each revision."""

    def __init__(self) -> None:
        self._claims: dict[tuple[int, int], Receipt] = {}

    def check(self, receipt: Receipt) -> None:
        """Raises CorruptResult for a second claim; the same receipt may come again."""
        if self._claims.setdefault((receipt.first, receipt.revision), receipt) != receipt:
            raise CorruptResult(
                f"{receipt.node} signed two receipts for positions {receipt.positions}, revision {receipt.revision}",
                hop=receipt.node,
            )


def check_terms(
    receipt: Receipt,
    terms: Terms,
    previous: Digest,
    want: tuple[bool, ...],
    context: Context,
    now: int,
    answer: tuple[bytes, bytes] = (ZERO32, ZERO32),
) -> None:
    """Raises CorruptResult naming the field of a signed receipt that is not what was agreed.

    answer: the challenge to the receipt before, and the root over the sketches that the node gave; zeros without any.
    """
    expected = {
        "node": terms.node,
        "model": terms.model,
        "numeric_class": terms.numeric_class,
        "session": terms.session,
        "attempt": terms.attempt,
        "start": terms.span.start,
        "end": terms.span.end,
        "previous": previous,
        "challenge": answer[0],
        "sketches": answer[1],
        "context": context.digest(),
    }
    for field, value in expected.items():
        if getattr(receipt, field) != value:
            raise CorruptResult(f"{terms.node} signed a receipt whose {field} is not what was agreed", hop=terms.node)
    if receipt.last - receipt.first != len(want):
        raise CorruptResult(f"{terms.node} signed a receipt for other positions", hop=terms.node)
    if abs(receipt.at - now) > CLOCK_SKEW_S:
        raise CorruptResult(f"{terms.node} signed a receipt with a time {receipt.at - now} s off", hop=terms.node)


def check_input(receipt: Receipt, upstream: Receipt | None, own_rows: list[bytes] | None) -> None:
    """Raises LinkMismatch unless the hop worked on what the hop before signed, or on what the client itself sent."""
    if upstream is not None:
        expected = Digest(upstream.output)
    else:
        assert own_rows is not None
        expected = merkle_root([leaf(row) for row in own_rows])
    if receipt.input != expected:
        raise LinkMismatch(f"{receipt.node} worked on other rows than it was sent", hop=receipt.node)


def check_output(receipt: Receipt, rows: list[bytes]) -> None:
    """Raises CorruptResult unless the last hop signed the very rows that it returned."""
    if receipt.output != merkle_root([leaf(row) for row in rows]):
        raise CorruptResult(f"{receipt.node} signed other results than it returned", hop=receipt.node)


def same_work(a: Receipt, b: Receipt) -> bool:
    """Did two hops claim to work on the same rows, for the same question?"""
    return (a.positions, a.span, a.model, a.input, a.context) == (b.positions, b.span, b.model, b.input, b.context)


def agree(a: Receipt, b: Receipt) -> bool:
    """Within a class the answer to the same work is the same bits."""
    return same_work(a, b) and a.output == b.output
