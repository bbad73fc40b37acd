"""The random projection: S, m x d with entries ±1/sqrt(m), expanded from a challenge (Achlioptas 2003).

S is linear, so S(a - b) = S a - S b: how far apart two nodes' rows lie can be measured without the rows. The challenge
must be unknown when the rows are committed to: whoever knows S hides any error in its null space.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

M = 16
"""Rows of S: values of a sketch."""

CHALLENGE_BYTES = 32


def matrix(challenge: bytes, width: int) -> Any:
    """S, (M, width) float64 with entries ±1/4.

    SHAKE-128(challenge) gives M x width bits, row by row, least significant bit of a byte first: 1 is +1/4, 0 is -1/4.
    Raises ValueError for a challenge of another length.
    """
    if len(challenge) != CHALLENGE_BYTES:
        raise ValueError(f"a challenge has {CHALLENGE_BYTES} bytes, not {len(challenge)}")
    drawn = hashlib.shake_128(challenge).digest(M * width // 8)
    bits = np.unpackbits(np.frombuffer(drawn, dtype=np.uint8), bitorder="little")
    signs = bits.astype(np.float64)
    signs -= 0.5
    signs *= 2 / np.sqrt(M)
    return signs.reshape(M, width)


def project(rows: Any, s: Any) -> Any:
    """S z of each row: rows (n, width) of floats, s (M, width); returns (n, M) float64.

    The order of a sum depends on the machine: holders of the same bytes agree to 1e-14 of the row's norm.
    """
    return np.asarray(rows, dtype=np.float64) @ s.T
