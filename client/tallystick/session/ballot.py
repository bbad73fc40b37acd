"""Who says what about the same work, and which output two at least have signed and nothing else as many: pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from tallystick_protocol.receipts import Receipt
from tallystick_protocol.types import Address, Digest


@dataclass(slots=True)
class Ballot:
    """Outputs that were signed for the same work, and by whom."""

    votes: dict[Digest, list[Address]] = field(default_factory=dict)

    def cast(self, receipt: Receipt) -> None:
        self.add(Digest(receipt.output), receipt.node)

    def add(self, output: Digest, witness: Address) -> None:
        """A witness that signs nothing: the client itself."""
        self.votes.setdefault(output, []).append(witness)

    @property
    def won(self) -> Digest | None:
        """The output of which two at least say that it is right, and more than of any other."""
        ranked = sorted(self.votes, key=lambda output: -len(self.votes[output]))
        if not ranked or len(self.votes[ranked[0]]) < 2:
            return None
        if len(ranked) > 1 and len(self.votes[ranked[1]]) == len(self.votes[ranked[0]]):
            return None
        return ranked[0]
