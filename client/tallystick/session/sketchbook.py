"""What one node has answered to challenges, and what its receipts must therefore say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tallystick_protocol.errors import CorruptResult
from tallystick_protocol.frames import DType, Frame, take
from tallystick_protocol.messages import CLOCK_SKEW_S
from tallystick_protocol.receipts import Receipt
from tallystick_protocol.sketching.rows import VALUES, Sketches
from tallystick_protocol.types import ZERO32, Address, Digest, Positions


@dataclass(frozen=True, slots=True)
class Challenge:
    """What all hops are asked for the rows of one window."""

    positions: Positions
    value: bytes


class Sketchbook:
    """Of one session at one node, by the digest of the receipt that was challenged. closed: the digest of the last
    window's receipt, once a closing receipt carries its sketches."""

    def __init__(self, is_on: bool) -> None:
        self.is_on = is_on
        self.answers: dict[Digest, Sketches] = {}
        self.closed: Digest | None = None
        self._asked: dict[Digest, Challenge] = {}

    def ask(self, digest: Digest, challenge: Challenge) -> bool:
        """Note that a receipt is challenged; False when it has been."""
        if self._asked.get(digest) == challenge:
            return False
        self._asked[digest] = challenge
        return True

    def ask_again(self) -> None:
        """What was on its way is lost: everything without an answer is to be asked again, the same."""
        self._asked = {digest: asked for digest, asked in self._asked.items() if digest in self.answers}

    def owes(self, digests: Iterable[Digest]) -> bool:
        """Whether one of these receipts was challenged and the answer is still to come."""
        return any(digest in self._asked and digest not in self.answers for digest in digests)

    def take(self, node: Address, frame: Frame) -> None:
        """Keep an answer. Raises CorruptResult for one that is none to what was asked."""
        digest = Digest(take(frame.body, "receipt", bytes))
        asked = self._asked.get(digest)
        given = Positions(frame.position, frame.position + frame.num_rows)
        if asked is None or asked.value != take(frame.body, "challenge", bytes) or asked.positions != given:
            raise CorruptResult(f"{node} sent sketches that nobody had asked for", hop=node)
        if frame.dtype is not DType.F32 or frame.shape[2] != VALUES:
            raise CorruptResult(f"{node} sent sketches of another form", hop=node)
        try:
            found = Sketches.from_bytes(asked.value, asked.positions, frame.tensor)
        except ValueError as error:
            raise CorruptResult(f"{node}: {error}", hop=node) from None
        before = self.answers.setdefault(digest, found)
        if before.to_bytes() != found.to_bytes():
            raise CorruptResult(f"{node} answered one challenge twice, differently", hop=node)

    def fields(self, previous: Digest) -> tuple[bytes, bytes] | None:
        """`challenge` and `sketches` of the receipt that names `previous`; None while its answer is not here."""
        if not self.is_on or previous == ZERO32:
            return ZERO32, ZERO32
        answer = self.answers.get(previous)
        return None if answer is None else (answer.challenge, answer.root)

    def close(self, last: Receipt, closing: Receipt, digest: Digest, now: int) -> None:
        """Take the receipt that closes the last window `last`, whose digest is given. Raises CorruptResult."""
        challenge, sketches = self.fields(digest) or (ZERO32, ZERO32)
        expected = replace(last, previous=digest, challenge=challenge, sketches=sketches)
        expected = replace(expected, revision=closing.revision, at=closing.at)
        if closing != expected or closing.revision <= last.revision or abs(closing.at - now) > CLOCK_SKEW_S:
            raise CorruptResult(f"{last.node} closed with a receipt that says something else", hop=last.node)
        self.closed = digest
