"""The header of a GGUF file, walked through: gguf's and transformers' readers believe every count and length in it.

    magic "GGUF", u32 version, u64 tensors, u64 keys, then the keys and the tensors, all little-endian
    key       string name, u32 type, value
    value     a number of its type's size; a string; or an array: u32 type, u64 count, values
    string    u64 length, bytes
    tensor    string name, u32 dimensions, u64 for each, u32 type, u64 offset
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from tallystick_protocol.errors import ManifestError

_NUMBERS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_MAX_COUNT = 1 << 23
"""Keys, tensors, and entries of an array; the largest vocabularies have a few hundred thousand."""
_MAX_DIMENSIONS, _MAX_DEPTH = 8, 2


def check_header(path: Path) -> None:
    """Raises ManifestError unless a file begins as GGUF does and no count or length goes beyond its end."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
            _Walk(held).through()
    except (ValueError, OSError) as error:
        raise ManifestError(f"{path.name} cannot be read as GGUF: {error}") from None


class _Walk:
    def __init__(self, held: mmap.mmap) -> None:
        self._held, self._at = held, 0

    def through(self) -> None:
        if self._held[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._skip(4)
        version, tensors, keys = self._number("<I"), self._count(), self._count()
        if version not in (2, 3):
            raise ValueError(f"version {version}, where 2 and 3 are read")
        for _ in range(keys):
            self._string()
            self._value(self._number("<I"), _MAX_DEPTH)
        for _ in range(tensors):
            self._string()
            dimensions = self._number("<I")
            if dimensions > _MAX_DIMENSIONS:
                raise ValueError(f"a tensor of {dimensions} dimensions")
            self._skip(8 * dimensions + 12)

    def _value(self, kind: int, depth: int) -> None:
        if kind in _NUMBERS:
            self._skip(_NUMBERS[kind])
        elif kind == _STRING:
            self._string()
        elif kind == _ARRAY and depth:
            inner, count = self._number("<I"), self._count()
            if inner in _NUMBERS:
                self._skip(count * _NUMBERS[inner])
            else:
                for _ in range(count):
                    self._value(inner, depth - 1)
        else:
            raise ValueError(f"a value of type {kind}")

    def _string(self) -> None:
        self._skip(self._number("<Q"))

    def _count(self) -> int:
        count = self._number("<Q")
        if count > _MAX_COUNT:
            raise ValueError(f"a count of {count}, where {_MAX_COUNT} is the limit")
        return count

    def _number(self, layout: str) -> int:
        begin = self._at
        self._skip(struct.calcsize(layout))
        (number,) = struct.unpack_from(layout, self._held, begin)
        return int(number)

    def _skip(self, length: int) -> None:
        if length > len(self._held) - self._at:
            raise ValueError("a length goes beyond its end")
        self._at += length
