"""Low-rank adapters that the client holds, on linear modules that nodes run (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tallystick_protocol.errors import ConfigError
from tallystick_protocol.passes import MAX_RANK

_PREFIX = "base_model.model."
"""How PEFT names the modules in an adapter's file."""


class Lora(nn.Module):
    """y = W x + (alpha / r) B A x on every adapted module. A is drawn, B begins as zero: at first nothing changes."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], rank: int, alpha: float) -> None:
        """shapes: {module: (in, out)}. Raises ConfigError for no modules, or a rank that nodes do not take."""
        super().__init__()
        if not shapes or not 0 < rank <= MAX_RANK:
            raise ConfigError(f"adapters take at least one target module and a rank from 1 to {MAX_RANK}")
        self.names = sorted(shapes)
        self.scale = alpha / rank
        self.a = nn.ParameterList(torch.empty(rank, shapes[name][0]) for name in self.names)
        self.b = nn.ParameterList(torch.zeros(shapes[name][1], rank) for name in self.names)
        for weight in self.a:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def tensors(self) -> list[torch.Tensor]:
        """A and (alpha / r) B of each module in turn."""
        pairs = zip(self.a, self.b, strict=True)
        return [tensor for a, b in pairs for tensor in (a, b * self.scale)]

    def save(self, path: Path) -> None:
        """Write the adapters as safetensors, named as in PEFT's adapter_model.safetensors."""
        save_file(self._named(), path)

    def load(self, path: Path) -> None:
        """Read what `save` wrote. Raises ConfigError when its names or shapes are others."""
        found, own = load_file(path), self._named()
        if {name: tensor.shape for name, tensor in found.items()} != {n: tensor.shape for n, tensor in own.items()}:
            raise ConfigError(f"{path} holds adapters of other modules or another rank")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(found[name])

    def _named(self) -> dict[str, torch.Tensor]:
        halves = {"lora_A": self.a, "lora_B": self.b}
        return {
            f"{_PREFIX}{name}.{half}.weight": weight.data
            for half, weights in halves.items()
            for name, weight in zip(self.names, weights, strict=True)
        }
