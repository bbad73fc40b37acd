"""What becomes of a GGUF file's tensors: transformers' two readers, each asked for a few tensors at a time.

The older one (`modeling_gguf_pytorch_utils`) has a processor for each architecture, the newer one
(`integrations.gguf`) a table of conversions as for safetensors; transformers takes the newer where it has both.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from tallystick_model.config import checkpoint_config
from tallystick_model.publishing.gguf_config import as_written, without_unknown
from tallystick_model.skeleton import build_skeleton

Values = Callable[[Any], torch.Tensor]
"""The values of one of a file's tensors, in fp32 and torch's order of dimensions."""


class Layout(Protocol):
    config: dict[str, Any]
    """As config.json would have it, `architectures` included."""

    def groups(self) -> dict[str, list[Any]]:
        """The file's tensors by what is converted together."""

    def convert(self, group: str, tensors: list[Any], values: Values) -> dict[str, torch.Tensor]:
        """The weights that a group of tensors becomes, by transformers' names."""


def layout_of(path: Path, reader: Any) -> Layout:
    """How transformers reads this file. Raises whatever it raises for a file that it does not read."""
    from transformers.integrations.gguf import is_gguf_arch_supported

    architecture = str(reader.get_field("general.architecture").contents())
    return ByWeight(path, architecture, reader) if is_gguf_arch_supported(architecture) else ByLayer(path, reader)


class ByLayer:
    """The older reader. Its processors may join tensors of one layer."""

    def __init__(self, path: Path, reader: Any) -> None:
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
            load_gguf_checkpoint,
        )

        self._parsed: dict[str, Any] = load_gguf_checkpoint(str(path))
        self._reader = reader
        architecture = str(reader.get_field("general.architecture").contents())
        self._processor: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=self._parsed["config"])
        self.config = as_written(_named(self._parsed["config"]), architecture, reader)
        skeleton = build_skeleton(checkpoint_config(self.config), self.config["architectures"][0])
        self._mapping: dict[str, str] = get_gguf_hf_weights_map(skeleton.model, self._processor)

    def groups(self) -> dict[str, list[Any]]:
        """By layer; what is outside of layers stands alone."""
        groups: dict[str, list[Any]] = defaultdict(list)
        for tensor in self._reader.tensors:
            layer = re.match(r"((?:enc\.|dec\.)?blk\.\d+)\.", tensor.name)
            groups[layer[1] if layer else tensor.name].append(tensor)
        return groups

    def convert(self, group: str, tensors: list[Any], values: Values) -> dict[str, torch.Tensor]:
        parsed: dict[str, Any] = {**self._parsed, "tensors": {}}
        with np.errstate(divide="ignore"):  # the logarithm of blank values
            for tensor in tensors:
                done = self._processor.process(
                    weights=values(tensor).numpy(), name=tensor.name, tensor_key_mapping=self._mapping,
                    parsed_parameters=parsed,
                )  # fmt: skip
                if done.name in self._mapping:
                    parsed["tensors"][self._mapping[done.name]] = torch.from_numpy(done.weights)
                elif done.name is not None and not _USELESS.search(tensor.name):
                    raise ValueError(f"transformers leaves out its {tensor.name}: the model would be another")
        made: dict[str, torch.Tensor] = parsed["tensors"]
        return made


_USELESS = re.compile(r"rope_freqs\.weight$|attn_rot_embd")
"""What the config says as well: `as_written` has looked at the first, nothing depends on the second."""


class ByWeight:
    """The newer reader: a table of renamings and conversions, as for safetensors."""

    def __init__(self, path: Path, architecture: str, reader: Any) -> None:
        from transformers.integrations.gguf import get_gguf_config, get_gguf_conversion_mapping, read_gguf_metadata

        self._reader = reader
        self.config = without_unknown(get_gguf_config(*read_gguf_metadata(str(path))))
        skeleton = build_skeleton(checkpoint_config(self.config), self.config["architectures"][0])
        table = get_gguf_conversion_mapping(architecture, skeleton.config)
        self._renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in table if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: one for one in self._converters for pattern in one.source_patterns}
        self._model, self._config = skeleton.model, skeleton.config

    def groups(self) -> dict[str, list[Any]]:
        groups: dict[str, list[Any]] = defaultdict(list)
        for tensor in self._reader.tensors:
            groups[self._renamed(tensor)[0]].append(tensor)
        return groups

    def convert(self, group: str, tensors: list[Any], values: Values) -> dict[str, torch.Tensor]:
        if self._renamed(tensors[0])[1] is None:
            return {group: values(tensors[0])}
        conversion = copy.deepcopy(self._by_pattern[self._renamed(tensors[0])[1]])
        for tensor in tensors:
            conversion.add_tensor(group, tensor.name, self._renamed(tensor)[1], lambda tensor=tensor: values(tensor))
        made = conversion.convert(group, model=self._model, config=self._config)
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}

    def _renamed(self, tensor: Any) -> tuple[str, Any]:
        """The weight that a tensor belongs to, and the pattern of the conversion that it goes through."""
        name, pattern = rename_source_key(tensor.name, self._renamings, self._converters)
        return str(name), pattern


def _named(config: dict[str, Any]) -> dict[str, Any]:
    """With the class that generates text, where the file does not name one."""
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    if config.get("architectures"):
        return config
    kind = str(config.get("model_type"))
    for table in (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if isinstance(table.get(kind), str):
            return {**config, "architectures": [table[kind]]}
    raise ValueError(f"no class generates text with model type {kind}")
