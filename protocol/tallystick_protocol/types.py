"""The values every other module speaks in: ids, units, spans and windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NewType

Address = NewType("Address", str)
"""An account, EIP-55 checksummed: `0x` and 40 hex digits."""

ModelId = NewType("ModelId", bytes)
"""32 bytes: keccak256(abi.encode(manifest digest, weights root, layers)), as `Models.sol` computes it."""

SessionId = NewType("SessionId", bytes)
"""32 bytes: SHA-256(chain id as 32 bytes big-endian || client || nonce || model)."""

Digest = NewType("Digest", bytes)
"""32 bytes: a SHA-256, Merkle root or EIP-712 digest."""

Wei = NewType("Wei", int)
"""Token base units, 1e-18 of a token."""

ZERO_ADDRESS = Address("0x0000000000000000000000000000000000000000")
ZERO32 = Digest(b"\0" * 32)

WINDOW = 32
"""Positions per receipt window."""


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Layers [start, end) of a model; the first span also embeds, the last one also runs norm and head."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"not a span: [{self.start}, {self.end})")

    def __len__(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"[{self.start}, {self.end})"

    def units(self, num_layers: int) -> int:
        """Layers this span is paid for: its own, one for the embedding and one for the head."""
        return len(self) + (self.start == 0) + (self.end == num_layers)


@dataclass(frozen=True, slots=True, order=True)
class Positions:
    """Positions [first, last) of a session."""

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last:
            raise ValueError(f"not a range of positions: [{self.first}, {self.last})")

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.last))

    def __str__(self) -> str:
        return f"[{self.first}, {self.last})"


def window_of(position: int) -> int:
    """The index of the window a position lies in."""
    return position // WINDOW


def window_positions(index: int, length: int) -> Positions:
    """The positions of window `index` in a session of `length` positions; the last window may be partial."""
    return Positions(min(index * WINDOW, length), min((index + 1) * WINDOW, length))
