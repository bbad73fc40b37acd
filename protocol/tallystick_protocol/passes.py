"""Whole tensors on the wire, for the passes of clients that tune: TENSOR frames, what they may hold, what rows cost.

A request's tensors come first, each in TENSOR frames in order of their rows; FORWARD or BACKWARD then names the
request. The answer's tensors come back likewise, before DONE. Body of a TENSOR frame: {"request": number of the
request, "name": str, "rows": all rows of the tensor}; the frame's position is its first row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from tallystick_protocol.errors import BadPosition, BadTensor
from tallystick_protocol.frames import VALUE_BYTES, DType, Frame, Kind, rows_per_frame, take

MAX_ROWS = 1024
"""Rows of one pass: bounds what a node must hold of it at once."""

MAX_RANK = 64
"""Rank of an adapter."""

MAX_NAME = 200
BACKWARD_ROWS = 3
"""A backward pass of n rows costs as much as 3 n rows: it runs the forward pass again (1), then backward (2)."""

_NUMPY = {DType.IDS: np.dtype("<u4"), DType.F32: np.dtype("<f4")}

A_SUFFIX, B_SUFFIX = ".lora_A", ".lora_B"
"""What an adapter's two tensors are called: the linear module's name and one of these."""


def tensor_frames(request: int, name: str, values: np.ndarray) -> Iterator[Frame]:
    """A tensor (rows, values per row), u32 ids or f32, as TENSOR frames."""
    dtype = DType.IDS if values.dtype.kind in "iu" else DType.F32
    data = np.ascontiguousarray(values, dtype=_NUMPY[dtype])
    step = rows_per_frame(data.shape[1] * VALUE_BYTES[dtype])
    body = {"request": request, "name": name, "rows": len(data)}
    for first in range(0, len(data), step):
        part = data[first : first + step]
        yield Frame(Kind.TENSOR, body, first, dtype, (1, len(part), part.shape[1]), part.tobytes())


class Collector:
    """Puts the tensors of one request together; another request's frames begin anew."""

    def __init__(
        self, check: Callable[[str, DType, int, int], None], reserve: Callable[[int], None] = lambda _: None
    ) -> None:
        """check(name, dtype, rows, width): raises BadTensor for what is not expected, before anything is kept.

        reserve(bytes): takes so many more bytes than were ever held at once, or raises Overloaded.
        """
        self._check = check
        self._reserve = reserve
        self._reserved = 0
        self._request = -1
        self._parts: dict[str, list[np.ndarray]] = {}
        self._sizes: dict[str, tuple[DType, int, int]] = {}

    def take(self, frame: Frame) -> None:
        """Keep a TENSOR frame. Raises BadFrame, BadTensor, BadPosition, Overloaded."""
        request, name, rows = (take(frame.body, key, kind) for key, kind in _FIELDS)
        if request != self._request:
            self._parts, self._sizes, self._request = {}, {}, request
        if frame.dtype not in _NUMPY or len(name) > MAX_NAME:
            raise BadTensor("tensors hold ids or f32 values, and have short names")
        size = (frame.dtype, rows, frame.shape[2])
        if name not in self._sizes:
            self._check(name, *size)
            self._sizes[name], self._parts[name] = size, []
            self._make_room()
        held = sum(len(part) for part in self._parts[name])
        if self._sizes[name] != size or frame.position != held or held + frame.num_rows > rows:
            raise BadPosition(f"rows of {name} come in order; next is {held} of {rows}", expected=held)
        values = np.frombuffer(frame.tensor, dtype=_NUMPY[frame.dtype]).reshape(frame.num_rows, frame.shape[2])
        if frame.dtype is DType.F32 and not bool(np.isfinite(values).all()):
            raise BadTensor(f"{name} holds NaN or infinity")
        self._parts[name].append(values)

    def whole(self, request: int) -> dict[str, np.ndarray]:
        """The tensors of a request, (rows, width) each; they are kept no longer. Raises BadTensor for missing rows."""
        parts, sizes = (self._parts, self._sizes) if request == self._request else ({}, {})
        self._parts, self._sizes, self._request = {}, {}, -1
        for name, (_, rows, _) in sizes.items():
            if sum(len(part) for part in parts[name]) != rows:
                raise BadTensor(f"{name} is not complete: {rows} rows were announced")
        return {name: np.concatenate(pieces) for name, pieces in parts.items()}

    def _make_room(self) -> None:
        needed = sum(rows * width * VALUE_BYTES[dtype] for dtype, rows, width in self._sizes.values())
        if needed > self._reserved:
            self._reserve(needed - self._reserved)
            self._reserved = needed


_FIELDS: tuple[tuple[str, type], ...] = (("request", int), ("name", str), ("rows", int))
