"""Checks a piece's file against the manifest without torch: layout, names, shapes, types, and every value finite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

import numpy as np

from tallystick_protocol.errors import ManifestError
from tallystick_protocol.manifest import Piece, TensorSpec

MAX_HEADER_BYTES = 100_000_000
"""safetensors' own limit."""
_CHUNK_BYTES = 16 << 20
_EXPONENTS: dict[str, tuple[np.dtype[Any], int]] = {
    "F32": (np.dtype("<u4"), 0x7F800000),
    "F16": (np.dtype("<u2"), 0x7C00),
    "BF16": (np.dtype("<u2"), 0x7F80),
}
"""Type of the same size, and the bits that are all set in NaN and infinity (IEEE 754)."""


def check_piece_file(path: Path, piece: Piece) -> None:
    """Raises ManifestError naming what is not as the manifest says. path: a file whose CID is right."""
    size = path.stat().st_size
    if size != piece.bytes:
        raise ManifestError(f"{piece.name} has {size} bytes, the manifest says {piece.bytes}")
    with path.open("rb") as file:
        start, entries = _header(file, piece, size)
        for name, spec in piece.tensors.items():
            found = TensorSpec(str(entries[name]["dtype"]), tuple(entries[name]["shape"]))
            if found != spec:
                said = f"{spec.dtype} {spec.shape}"
                raise ManifestError(f"{name} is {found.dtype} {found.shape}, the manifest says {said}")
        _check_layout(piece, entries, size - start)
        for name, spec in piece.tensors.items():
            file.seek(start + entries[name]["data_offsets"][0])
            _check_values(file, name, spec)


def _header(file: IO[bytes], piece: Piece, size: int) -> tuple[int, dict[str, Any]]:
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
        raise ManifestError(f"{piece.name} is not a safetensors file: its header would have {length} bytes")
    try:
        header = json.loads(file.read(length))
        entries = {name: value for name, value in header.items() if name != "__metadata__"}
        for value in entries.values():
            low, high = value["data_offsets"]
            if type(low) is not int or type(high) is not int or not isinstance(value["shape"], list):
                raise ValueError("offsets and shapes are integers")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ManifestError(f"{piece.name} is not a safetensors file: {str(error)[:100]}") from None
    for what, names in (("lacks", piece.tensors.keys() - entries), ("holds, unasked,", entries.keys() - piece.tensors)):
        if names:
            raise ManifestError(f"{piece.name} {what} {', '.join(sorted(names)[:3])}")
    return 8 + length, entries


def _check_layout(piece: Piece, entries: dict[str, Any], data_bytes: int) -> None:
    end = 0
    for name, value in sorted(entries.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        low, high = value["data_offsets"]
        if low != end or high - low != piece.tensors[name].bytes:
            raise ManifestError(f"{piece.name}: the bytes of {name} overlap others, leave a hole or are too few")
        end = high
    if end != data_bytes:
        raise ManifestError(f"{piece.name} holds {data_bytes - end} bytes that belong to no tensor")


def _check_values(file: IO[bytes], name: str, spec: TensorSpec) -> None:
    if spec.dtype not in _EXPONENTS:
        return
    dtype, exponent = _EXPONENTS[spec.dtype]
    left = spec.bytes
    while left:
        data = file.read(min(left, _CHUNK_BYTES))
        if not data:
            raise ManifestError(f"the file ends within {name}")
        left -= len(data)
        if bool(np.any((np.frombuffer(data, dtype) & exponent) == exponent)):
            raise ManifestError(f"{name} holds NaN or infinity")
