"""Low-rank adapters that the client holds, on linear modules that nodes run (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from tallystick.torch import adapter_files
from tallystick_protocol.errors import ConfigError
from tallystick_protocol.passes import MAX_RANK


class Lora(nn.Module):
    """y = W x + (alpha / r) B A x on every adapted module. A is drawn, B begins as zero: at first nothing changes."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], rank: int, alpha: float, base: str = "") -> None:
        """shapes: {module: (in, out)}; base: what people call the model. Raises ConfigError for no modules, or a rank
        that nodes do not take."""
        super().__init__()
        if not shapes or not 0 < rank <= MAX_RANK:
            raise ConfigError(f"adapters take at least one target module and a rank from 1 to {MAX_RANK}")
        self.names = sorted(shapes)
        self.rank, self.alpha, self.base = rank, alpha, base
        self.scale = alpha / rank
        self.a = nn.ParameterList(torch.empty(rank, shapes[name][0]) for name in self.names)
        self.b = nn.ParameterList(torch.zeros(shapes[name][1], rank) for name in self.names)
        for weight in self.a:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def tensors(self) -> list[torch.Tensor]:
        """A and (alpha / r) B of each module in turn."""
        pairs = zip(self.a, self.b, strict=True)
        return [tensor for a, b in pairs for tensor in (a, b * self.scale)]

    def save(self, folder: Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors as PEFT does; makes the folder."""
        pairs = {name: (a.data, b.data) for name, a, b in zip(self.names, self.a, self.b, strict=True)}
        adapter_files.write(Path(folder), adapter_files.Adapters(pairs, self.alpha, self.base))

    def load(self, folder: Path) -> None:
        """Read what `save` or PEFT wrote. Raises ConfigError where these are other adapters than this model has."""
        found = adapter_files.read(Path(folder))
        own = {name: (a.shape[1], len(b)) for name, a, b in zip(self.names, self.a, self.b, strict=True)}
        if found.shapes != own or found.rank != self.rank or found.alpha != self.alpha:
            raise ConfigError(f"{folder} holds adapters of other modules, another rank or another alpha")
        self.take(found)

    def take(self, found: adapter_files.Adapters) -> None:
        """The weights of adapters of the same modules and rank."""
        with torch.no_grad():
            for name, own_a, own_b in zip(self.names, self.a, self.b, strict=True):
                own_a.copy_(found.pairs[name][0])
                own_b.copy_(found.pairs[name][1])
