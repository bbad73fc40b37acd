"""How hidden rows travel between hops: whole (f32), or rounded for slow links (bf16, int8).

What is rounded is the row itself, for everybody: the bytes on the wire are what a hop signs as its output, what the
next one signs as its input and what an auditor is fed, so that checks by equality hold as they do for f32.

f32   4 bytes a value, little-endian
bf16  2 bytes a value: the upper half of the f32 after rounding to nearest, ties to even
int8  a scale s, f32 little-endian, then a byte a value: round-half-even(x / s), with s = max |x| / 127
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np

from tallystick_protocol.errors import BadMessage
from tallystick_protocol.frames import DType

Wire = Literal["f32", "bf16", "int8"]
WIRES: tuple[Wire, ...] = get_args(Wire)
DTYPES: dict[Wire, DType] = {"f32": DType.F32, "bf16": DType.BF16, "int8": DType.INT8}
_SCALE_BYTES = 4
_SMALLEST_NORMAL = np.float32(1.1754944e-38)


def wire_of(name: object) -> Wire:
    """Raises BadMessage for a name that is none of them."""
    for wire in WIRES:
        if wire == name:
            return wire
    raise BadMessage(f"hidden rows travel as {', '.join(WIRES)}")


def values_per_row(wire: Wire, width: int) -> int:
    """What a frame's shape says of a row of so many values: with int8, its scale takes four more places."""
    return width + _SCALE_BYTES if wire == "int8" else width


def encode(rows: Any, wire: Wire) -> list[bytes]:
    """The bytes of each row; rows (n, width) float32, finite."""
    if wire == "f32":
        return [row.tobytes() for row in rows]
    if wire == "bf16":
        bits = rows.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return [row.tobytes() for row in rounded.astype("<u2")]
    scales = np.abs(rows).max(axis=1).astype(np.float32) / np.float32(127)
    safe = np.where(scales > 0, scales, np.float32(1))
    steps = np.clip(np.rint(rows / safe[:, None]), -127, 127).astype(np.int8)
    return [scale.astype("<f4").tobytes() + row.tobytes() for scale, row in zip(scales, steps, strict=True)]


def decode(data: bytes | bytearray | memoryview, wire: Wire, width: int) -> Any:
    """Rows (n, width) float32. A row's values that would be denormal are zero."""
    if wire == "f32":
        return np.frombuffer(data, dtype="<f4").reshape(-1, width)
    if wire == "bf16":
        rows = (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32).reshape(-1, width)
    else:
        packed = np.frombuffer(data, dtype=np.uint8).reshape(-1, width + _SCALE_BYTES)
        scales = packed[:, :_SCALE_BYTES].copy().view("<f4")
        rows = packed[:, _SCALE_BYTES:].view(np.int8).astype(np.float32) * scales
    return np.where(np.abs(rows) < _SMALLEST_NORMAL, np.float32(0), rows) if wire == "int8" else rows
