"""A GGUF file as a checkpoint: config, tokenizer and tensors as transformers reads them, one layer at a time.

transformers' `load_gguf_checkpoint` reads the metadata, and its tensor processors undo what llama.cpp did to each
architecture's tensors. It would dequantise the whole model at once; here the tensors of one layer are dequantised when
one of them is asked for.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from tallystick_model.config import checkpoint_config
from tallystick_model.publishing.checkpoint import CHUNK_BYTES, read_json
from tallystick_model.sandbox.conversion import convert_tokenizer
from tallystick_model.skeleton import BUILD_ERRORS, build_skeleton
from tallystick_protocol.errors import ConfigError, ManifestError


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
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        self.path, self.folder = path, scratch / "gguf"
        self.folder.mkdir()
        try:
            self._parsed: dict[str, Any] = load_gguf_checkpoint(str(path))
            self._reader: Any = GGUFReader(str(path))
            self.config: dict[str, Any] = _config_of(self._parsed)
            self._mapping, self._processor = self._tables()
            self._groups = self._grouped()
            self._held: dict[str, tuple[str, tuple[int, ...]]] = {}
            for group in self._groups:
                for name, tensor in self._convert(group, _blank).items():
                    self._held[name] = (group, tuple(tensor.shape))
        except (*BUILD_ERRORS, OSError, NotImplementedError) as error:
            raise ManifestError(f"{path.name} cannot be read as GGUF: {str(error)[:160]}") from None
        self._loaded: tuple[str, dict[str, torch.Tensor]] = ("", {})
        self._write_companions()

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
            self._loaded = (group, self._convert(group, _dequantised))
        tensor = self._loaded[1][name]
        step = max(1, CHUNK_BYTES * len(tensor) // max(1, tensor.nbytes)) if tensor.ndim else 1
        yield from tensor.split(step) if tensor.ndim else (tensor,)

    def fingerprint(self) -> list[list[Any]]:
        stat = self.path.stat()
        return [[self.path.name, stat.st_size, stat.st_mtime_ns]]

    def _tables(self) -> tuple[dict[str, str], Any]:
        """transformers' {tensor in GGUF: weight} and the processor of the architecture."""
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
            read_field,
        )

        architecture = read_field(self._reader, "general.architecture")[0]
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=self._parsed["config"])
        skeleton = build_skeleton(checkpoint_config(self.config), self.config["architectures"][0])
        return get_gguf_hf_weights_map(skeleton.model, processor), processor

    def _grouped(self) -> dict[str, list[Any]]:
        """The file's tensors by the layer that they belong to; what is outside of layers stands alone."""
        groups: dict[str, list[Any]] = defaultdict(list)
        for tensor in self._reader.tensors:
            layer = re.match(r"((?:enc\.|dec\.)?blk\.\d+)\.", tensor.name)
            groups[layer[1] if layer else tensor.name].append(tensor)
        return groups

    def _convert(self, group: str, values: Callable[[Any], Any]) -> dict[str, torch.Tensor]:
        """The weights that a group of tensors becomes."""
        parsed: dict[str, Any] = {**self._parsed, "tensors": {}}
        for tensor in self._groups[group]:
            done = self._processor.process(
                weights=values(tensor), name=tensor.name, tensor_key_mapping=self._mapping, parsed_parameters=parsed
            )
            if done.name in self._mapping:
                made = np.ascontiguousarray(done.weights, dtype=np.float32)
                parsed["tensors"][self._mapping[done.name]] = torch.from_numpy(made.reshape(done.weights.shape).copy())
        tensors: dict[str, torch.Tensor] = parsed["tensors"]
        return tensors

    def _write_companions(self) -> None:
        convert_tokenizer(self.path.parent, self.folder, gguf=self.path.name)
        said = self._parsed.get("tokenizer_config", {})
        ids = {key: said.get(key, self.config.get(key)) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        known = {key: value for key, value in ids.items() if value is not None}
        (self.folder / "generation_config.json").write_text(json.dumps(known))
        field = self._reader.fields.get("general.license")
        if field is not None:
            licence = bytes(field.parts[field.data[0]]).decode("utf-8", errors="replace")
            (self.folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n")


def _config_of(parsed: dict[str, Any]) -> dict[str, Any]:
    config = {key: value for key, value in parsed["config"].items() if not key.startswith("_")}
    if not config.get("architectures"):
        kind = str(config.get("model_type"))
        for table in (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
            if isinstance(table.get(kind), str):
                return {**config, "architectures": [table[kind]]}
        raise ValueError(f"no class generates text with model type {kind}")
    return config


def _dequantised(tensor: Any) -> Any:
    from gguf import dequantize

    return dequantize(tensor.data, tensor.tensor_type)


def _blank(tensor: Any) -> Any:
    """Values of the right shape that take no memory: for finding out what becomes what."""
    return np.broadcast_to(np.float32(0), tuple(int(length) for length in reversed(tensor.shape)))
