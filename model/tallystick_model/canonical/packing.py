"""Whose rows travel in which call: packs the segments of several sessions into calls of at most MAX_ROWS rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_CALL_ROWS = 256
"""Rows per forward call: bounds what a call allocates, and the shapes that kernels are asked for."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows [first, last) of segment `segment`."""

    segment: int
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first


def pack(lengths: Sequence[int], *, divisible: bool, limit: int = MAX_CALL_ROWS) -> list[list[Part]]:
    """Cut and group segments, in order. Indivisible ones (bidirectional) stay whole, even beyond the limit."""
    calls: list[list[Part]] = []
    room = 0
    for segment, length in enumerate(lengths):
        first = 0
        while first < length:
            wants = min(length - first, limit) if divisible else length
            if room == 0 or (wants > room and not divisible):
                calls.append([])
                room = limit
            taken = min(wants, room) if divisible else wants
            calls[-1].append(Part(segment, first, first + taken))
            first += taken
            room = max(0, room - taken)
    return calls
