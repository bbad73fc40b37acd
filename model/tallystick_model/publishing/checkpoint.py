"""A Hugging Face checkpoint folder, read tensor by tensor and row by row: safetensors only, nothing is mapped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from tallystick_protocol.errors import ManifestError

MAX_JSON_BYTES = 64 << 20
MAX_CONFIG_DEPTH = 16
CHUNK_BYTES = 16 << 20
"""Bytes of a tensor that are in memory at a time."""

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
"""Dtypes of tensors as safetensors writes them. I64 is for tables of indices: no weight is stored so."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack", "*.ot", "*.onnx")


class TensorSource(Protocol):
    """Where the tensors and the small files of a checkpoint come from: a folder of safetensors, or a GGUF file."""

    folder: Path
    config: dict[str, Any]

    def read_json(self, name: str) -> Any:
        """A JSON file of the folder; None when it is not there. Raises ManifestError when it is not JSON."""

    def names(self) -> frozenset[str]: ...

    def spec(self, name: str) -> tuple[str, tuple[int, ...]]:
        """dtype as safetensors writes it, and shape."""

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor as it is stored, in runs of whole rows (first dimension) of about CHUNK_BYTES, in order."""

    def fingerprint(self) -> list[list[Any]]:
        """What changes when a file of the checkpoint does: [name, bytes, time of change in ns] of each."""


@dataclass(frozen=True, slots=True)
class _Stored:
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""


class Checkpoint:
    """The tensors of a folder, by the names that its files use."""

    def __init__(self, folder: Path) -> None:
        """Raises ManifestError for a folder without config.json or without sound safetensors files."""
        self.folder = folder
        config = self.read_json("config.json")
        if not isinstance(config, dict):
            self._refuse_pickles()
            raise ManifestError(f"{folder} has no config.json: publish a Hugging Face checkpoint folder")
        if _depth(config) > MAX_CONFIG_DEPTH:
            raise ManifestError("config.json is nested too deeply")
        self.config: dict[str, Any] = config
        self._tensors = self._index()

    def read_json(self, name: str) -> Any:
        return read_json(self.folder / name)

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def spec(self, name: str) -> tuple[str, tuple[int, ...]]:
        return self._tensors[name].dtype, self._tensors[name].shape

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        stored = self._tensors[name]
        if (dtype := TORCH_DTYPES.get(stored.dtype)) is None:
            raise ManifestError(f"{name} is {stored.dtype}; {', '.join(TORCH_DTYPES)} can be read")
        rows = stored.shape[0] if stored.shape else 1
        step = max(1, CHUNK_BYTES // max(1, math.prod(stored.shape[1:]) * dtype.itemsize))
        for first in range(0, rows, step):
            chunk = self.rows(name, first, min(step, rows - first), dtype)
            yield chunk if stored.shape else chunk.view(())

    def rows(self, name: str, first: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Some rows of a tensor (first dimension), whose values have that dtype. Raises ManifestError."""
        stored = self._tensors[name]
        row_bytes = math.prod(stored.shape[1:]) * dtype.itemsize
        data = bytearray(count * row_bytes)
        with stored.file.open("rb") as file:
            file.seek(stored.offset + first * row_bytes)
            if file.readinto(data) != len(data):
                raise ManifestError(f"{stored.file.name} ends within {name}: download it again")
        chunk = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return chunk.view(count, *stored.shape[1:])

    def fingerprint(self) -> list[list[Any]]:
        """The folder's own files and what they link to; subfolders hold nothing that is published but pooling."""
        found = sorted(path for path in self.folder.iterdir() if path.is_file())
        return [[path.name, (stat := path.stat()).st_size, stat.st_mtime_ns] for path in found]

    def _index(self) -> dict[str, _Stored]:
        files, promised = self._files()
        found: dict[str, _Stored] = {}
        for name in sorted(files):
            path = self.folder / name
            if not path.is_file():
                self._refuse_pickles()
                raise ManifestError(f"{self.folder} lacks {name}: download the whole checkpoint")
            for tensor, stored in _tensors_of(path).items():
                if tensor in found:
                    raise ManifestError(f"{tensor} is in {name} and in {found[tensor].file.name}")
                found[tensor] = stored
        absent = sorted(promised - found.keys())
        if absent:
            raise ManifestError(f"the index promises {absent[0][:100]} and {len(absent) - 1} more that no file holds")
        return found

    def _files(self) -> tuple[set[str], set[str]]:
        """The safetensors files of the folder, and the tensors that its index lists."""
        index = self.read_json("model.safetensors.index.json")
        if index is None:
            return {"model.safetensors"}, set()
        table = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(table, dict) or not table:
            raise ManifestError("model.safetensors.index.json has no weight_map: download it again")
        for name in table.values():
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ManifestError(f"the index names a file {str(name)[:60]!r}")
        return set(table.values()), set(table)

    def _refuse_pickles(self) -> None:
        others = sorted(path.name for pattern in _PICKLES for path in self.folder.glob(pattern))
        if others:
            raise ManifestError(
                f"{self.folder} holds weights only as {', '.join(others[:3])}, which can run code when they are read; "
                "convert them to safetensors: model.save_pretrained(folder)"
            )
        if ggufs := sorted(path.name for path in self.folder.glob("*.gguf")):
            raise ManifestError(f"{self.folder} holds {ggufs[0]}: publish that file itself")


def read_json(path: Path) -> Any:
    """A JSON file; None when it is not there. Raises ManifestError when it is too large or not JSON."""
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ManifestError(f"{path.name} has {path.stat().st_size} bytes; {MAX_JSON_BYTES} is the limit")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path.name} is not JSON: {str(error)[:80]}") from None


def _depth(value: Any) -> int:
    """How deeply objects and lists are nested; the parser has bounded it."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)


def _tensors_of(path: Path) -> dict[str, _Stored]:
    """What a safetensors file holds, by its header; the library checks that nothing overlaps or is left out."""
    try:
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ManifestError(f"{path.name} is not a safetensors file: {str(error)[:120]}") from None
    return {
        name: _Stored(path, said["dtype"], tuple(said["shape"]), 8 + length + said["data_offsets"][0])
        for name, said in header.items()
        if name != "__metadata__"
    }
