"""Adapters on disk: a folder as PEFT writes and reads it.

adapter_model.safetensors: of each module A (rank, in) as `base_model.model.<module>.lora_A.weight` and B (out, rank) as
`….lora_B.weight`. adapter_config.json: what they mean. (PEFT's "Checkpoint format" page.)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tallystick_protocol.errors import ConfigError

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_MAX_CONFIG_BYTES = 1 << 20

_READ = {"peft_type", "r", "lora_alpha"}
_ELSEWHERE = {
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"
}  # fmt: skip
"""Which modules have adapters: the names of the tensors say it, too."""

_NO_RESULT = {
    "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision", "task_type",
}  # fmt: skip
"""Settings of training, of other libraries, and notes. `bias` and `init_lora_weights` have values that say more."""

_INITIAL = (True, False, "gaussian")
"""Other ways to begin change the model's own weights, too."""


@dataclass(frozen=True, slots=True)
class Adapters:
    """pairs: {module: (A (rank, in), B (out, rank))}; base: what the model is called."""

    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]
    alpha: float
    base: str = ""

    @property
    def rank(self) -> int:
        return len(next(iter(self.pairs.values()))[0])

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """{module: (in, out)}."""
        return {name: (a.shape[1], b.shape[0]) for name, (a, b) in self.pairs.items()}


def write(folder: Path, adapters: Adapters) -> None:
    """Make the folder and both files."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{_PREFIX}{name}.{half}.weight": tensor.contiguous()
        for name, pair in adapters.pairs.items()
        for half, tensor in zip(("lora_A", "lora_B"), pair, strict=True)
    }
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": adapters.base or None,
        "r": adapters.rank, "lora_alpha": adapters.alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted(adapters.pairs), "inference_mode": True,
    }  # fmt: skip
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def read(folder: Path) -> Adapters:
    """Raises ConfigError for what is no folder of LoRA adapters, or says what this library does not do."""
    config = _config(folder / _CONFIG)
    try:
        tensors = load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{folder / _WEIGHTS} cannot be read: {str(error)[:120]}") from None
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, half = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if name != f"{_PREFIX}{module}.{half}.weight" or half not in ("lora_A", "lora_B") or tensor.ndim != 2:
            raise ConfigError(f"{folder / _WEIGHTS} holds {name[:120]}, which is no adapter of a linear module")
        halves.setdefault(module, {})[half] = tensor.float()
    for module, pair in halves.items():
        if set(pair) != {"lora_A", "lora_B"} or not len(pair["lora_A"]) == pair["lora_B"].shape[1] == config["r"]:
            raise ConfigError(f"the adapters of {module[:120]} are not two matrices of rank {config['r']}")
    if not halves:
        raise ConfigError(f"{folder / _WEIGHTS} holds no adapters")
    return Adapters({name: (pair["lora_A"], pair["lora_B"]) for name, pair in halves.items()}, config["lora_alpha"])


def _config(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            config = json.loads(file.read(_MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {str(error)[:120]}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ConfigError(f"{path} does not describe LoRA adapters")
    other = [key for key, value in config.items() if value and key not in _READ | _ELSEWHERE | _NO_RESULT]
    other += ["bias"] if config.get("bias", "none") != "none" else []
    other += ["init_lora_weights"] if config.get("init_lora_weights", True) not in _INITIAL else []
    if other:
        raise ConfigError(f"{path}: {', '.join(sorted(other))[:120]} is not supported")
    for key, kinds in (("r", int), ("lora_alpha", (int, float))):
        value = config.get(key)
        if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < 2**31:
            raise ConfigError(f"{path}: {key} is no positive number")
    return config
