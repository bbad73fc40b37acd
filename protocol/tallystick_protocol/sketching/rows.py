"""A window's sketches: what a hop answers to a challenge, as bytes and under one root.

One row of 33 f32 little-endian values for each position:

    offset  values  what
    0       16      S x: of the row that entered the span; of the embedding's output, where token ids enter
    64      16      S (y - x): of what the span added to it; zeros where no hidden row leaves
    128     1       the scale of y: |y - x|; where logits leave, their standard deviation; where scores do, their root
                    mean square; zero where nobody wanted the result
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tallystick_protocol.receipts import rows_root
from tallystick_protocol.sketching.matrix import M, matrix, project
from tallystick_protocol.types import Digest, Positions

VALUES = 2 * M + 1
ROW_BYTES = 4 * VALUES
BLOCK_VALUES = 1 << 14
"""Sketched at a time: what is larger, the system gives and takes back each time, which takes longer than the sums."""


@dataclass(frozen=True, slots=True, eq=False)
class Sketches:
    """The sketches of consecutive positions under one challenge. rows: (n, VALUES) float32."""

    challenge: bytes
    positions: Positions
    rows: Any

    @property
    def entered(self) -> Any:
        """S x, (n, M)."""
        return self.rows[:, :M]

    @property
    def added(self) -> Any:
        """S (y - x), (n, M)."""
        return self.rows[:, M : 2 * M]

    @property
    def scales(self) -> Any:
        """(n,)."""
        return self.rows[:, 2 * M]

    @property
    def root(self) -> Digest:
        """SHA256(0x02 || challenge || first, last as u32 big-endian || Merkle root over the rows' bytes)."""
        first, last = self.positions.first.to_bytes(4, "big"), self.positions.last.to_bytes(4, "big")
        inner = rows_root(row.tobytes() for row in self.rows.astype("<f4"))
        return Digest(hashlib.sha256(b"\x02" + self.challenge + first + last + inner).digest())

    def to_bytes(self) -> bytes:
        return bytes(self.rows.astype("<f4").tobytes())

    @staticmethod
    def from_bytes(challenge: bytes, positions: Positions, data: bytes | memoryview) -> Sketches:
        """Raises ValueError unless the bytes are one row a position, all values finite, no scale negative."""
        if len(data) != ROW_BYTES * len(positions):
            raise ValueError(f"{len(data)} bytes are not the sketches of {len(positions)} positions")
        rows = np.frombuffer(bytes(data), dtype="<f4").reshape(-1, VALUES)
        if not bool(np.isfinite(rows).all()) or bool((rows[:, 2 * M] < 0).any()):
            raise ValueError("a sketch holds NaN, infinity or a negative scale")
        return Sketches(challenge, positions, rows)


def sketch(
    challenge: bytes, positions: Positions, entered: Any, left: Any | None, scales: Sequence[float] | None = None
) -> Sketches:
    """Sketch the rows of a window.

    entered: (n, width) float32. left: (n, width) float32, NaN in rows that nobody wanted; None where no hidden rows
    leave. scales: (n,), where none do. Computed in float64, rounded once.
    """
    s = matrix(challenge, entered.shape[1])
    rows = np.zeros((len(positions), VALUES))
    few = max(BLOCK_VALUES // entered.shape[1], 1)
    for begin in range(0, len(positions), few):
        part = slice(begin, begin + few)
        came = entered[part].astype(np.float64)
        rows[part, :M] = project(came, s)
        if left is not None:
            added = left[part].astype(np.float64) - came
            added[np.isnan(added[:, 0])] = 0.0
            rows[part, M : 2 * M] = project(added, s)
            rows[part, 2 * M] = np.sqrt(np.einsum("ij,ij->i", added, added))
    if left is None and scales is not None:
        rows[:, 2 * M] = scales
    return Sketches(challenge, positions, rows.astype(np.float32))
