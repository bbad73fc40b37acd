"""A GGUF file as a checkpoint: config, tokenizer and tensors as transformers reads them, one layer at a time.

transformers would dequantise the whole model at once; here the tensors of one layer are dequantised when one of them
is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tallystick_model.publishing.checkpoint import CHUNK_BYTES, read_json
from tallystick_model.publishing.gguf_header import check_header
from tallystick_model.publishing.gguf_layouts import Layout, layout_of
from tallystick_model.sandbox.conversion import convert_tokenizer
from tallystick_model.skeleton import BUILD_ERRORS
from tallystick_protocol.errors import ConfigError, ManifestError

_ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
"""Where a file says which tokens end an answer: the text, the turn."""


class GgufCheckpoint:
    """The tensors of a GGUF file, by transformers' names, in fp32."""

    def __init__(self, path: Path, scratch: Path) -> None:
        """scratch: a folder for the tokenizer that is made of it.

        Raises ConfigError without the package gguf, ManifestError for a file that it or transformers does not read.
        """
        try:
            from gguf import GGUFReader
        except ImportError:
            raise ConfigError("reading GGUF files takes the package gguf: pip install 'tallystick[gguf]'") from None
        self.path, self.folder = path, scratch / "gguf"
        self.folder.mkdir()
        check_header(path)
        try:
            self._reader: Any = GGUFReader(str(path))
            self._layout: Layout = layout_of(path, self._reader)
            self.config: dict[str, Any] = self._layout.config
            self._groups = self._layout.groups()
            self._held: dict[str, tuple[str, tuple[int, ...]]] = {}
            for group, tensors in self._groups.items():
                for name, tensor in self._layout.convert(group, tensors, _blank).items():
                    self._held[name] = (group, tuple(tensor.shape))
            self._write_settings()
        except (*BUILD_ERRORS, OSError) as error:
            raise ManifestError(f"{path.name} cannot be read as GGUF: {str(error)[:160]}") from None
        self._loaded: tuple[str, dict[str, torch.Tensor]] = ("", {})
        self._write_tokenizer(scratch / "file")

    def read_json(self, name: str) -> Any:
        return read_json(self.folder / name)

    def names(self) -> frozenset[str]:
        return frozenset(self._held)

    def spec(self, name: str) -> tuple[str, tuple[int, ...]]:
        return "F32", self._held[name][1]

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        group = self._held[name][0]
        if self._loaded[0] != group:
            self._loaded = ("", {})  # the layer before goes first
            self._loaded = (group, self._layout.convert(group, self._groups[group], _dequantised))
        tensor = self._loaded[1][name].contiguous()
        step = max(1, CHUNK_BYTES * len(tensor) // max(1, tensor.nbytes)) if tensor.ndim else 1
        yield from tensor.split(step) if tensor.ndim else (tensor,)

    def fingerprint(self) -> list[list[Any]]:
        stat = self.path.stat()
        return [[self.path.name, stat.st_size, stat.st_mtime_ns]]

    def _write_tokenizer(self, alone: Path) -> None:
        """Made of the file alone: a tokenizer.json that lies beside it may be another model's."""
        alone.mkdir()
        (alone / self.path.name).symlink_to(self.path.resolve())
        try:
            convert_tokenizer(alone, self.folder, gguf=self.path.name)
        except ManifestError as error:
            raise ManifestError(f"{self.path.name} cannot be read as GGUF: {error.message}") from None

    def _write_settings(self) -> None:
        said = {key: self.config.get(key) for key in ("bos_token_id", "pad_token_id")}
        ends = [int(field.contents()) for key in _ENDS if (field := self._reader.get_field(key)) is not None]
        said["eos_token_id"] = sorted(set(ends)) or None
        known = {key: value for key, value in said.items() if value is not None}
        (self.folder / "generation_config.json").write_text(json.dumps(known))
        field = self._reader.get_field("general.license")
        if field is not None:
            (self.folder / "LICENSE").write_text(str(field.contents()))


def _dequantised(tensor: Any) -> torch.Tensor:
    from gguf import dequantize

    return torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))


def _blank(tensor: Any) -> torch.Tensor:
    """Values of the right shape that take no memory: for finding out what becomes what."""
    return torch.zeros(()).expand(tuple(int(length) for length in reversed(tensor.shape)))
