"""Which device each layer of a span is on, and the moving of what passes between them.

A span's layers fill one device after the other by free memory, and the CPU takes the rest. What comes before the
layers (embeddings, rotary tables, masks) is on the first layer's device, what comes behind them (last norm, head) on
the last one's. A layer's arguments are moved to its device. Rows enter and leave the span on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tallystick_protocol.errors import ConfigError, ManifestError
from tallystick_protocol.types import Span

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Placement:
    """start: the span's first layer; devices: of the span's layers, in their order."""

    start: int
    devices: tuple[torch.device, ...]

    @staticmethod
    def on(device: torch.device, span: Span) -> Placement:
        """All layers on one device."""
        return Placement(span.start, (device,) * len(span))

    @property
    def first(self) -> torch.device:
        return self.devices[0]

    @property
    def last(self) -> torch.device:
        return self.devices[-1]

    @property
    def distinct(self) -> tuple[torch.device, ...]:
        """Every device once, in the order of the layers."""
        return tuple(dict.fromkeys(self.devices))

    def of_layer(self, layer: int) -> torch.device:
        return self.devices[layer - self.start]

    def of_weight(self, role: str) -> torch.device:
        """role: a weight's in the anatomy, `tied` for the head's copy of an embedding."""
        if role.startswith("layer."):
            return self.of_layer(int(role.removeprefix("layer.")))
        return self.last if role in ("head", "tied") else self.first

    def __str__(self) -> str:
        """For logs: "0:3 on cuda:0, 3:4 on cpu"."""
        parts, begin = [], 0
        for end in range(1, len(self.devices) + 1):
            if end == len(self.devices) or self.devices[end] != self.devices[begin]:
                parts.append(f"{self.start + begin}:{self.start + end} on {self.devices[begin]}")
                begin = end
        return ", ".join(parts)


def find_devices(setting: str) -> tuple[torch.device, ...]:
    """The accelerators that a setting names: "cpu" none, "cuda" and "auto" all, "cuda:N" one.

    Raises ConfigError for a device that is not there; "auto" takes what there is.
    """
    if setting == "cpu":
        return ()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = [torch.device("cuda", index) for index in range(count)]
    if setting == "auto":
        return tuple(there)
    named = torch.device(setting)
    chosen = [device for device in there if named.index in (None, device.index)]
    if not chosen:
        seen = f"torch {torch.__version__} sees {', '.join(str(device) for device in there) or 'no CUDA device'} here"
        raise ConfigError(f'device = "{setting}" is not there: {seen}; set device = "cpu" or "auto"')
    return tuple(chosen)


def free_bytes(device: torch.device) -> int:
    """Free memory of a CUDA device, without what torch keeps for itself of memory that was freed."""
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])


def forbid_tf32() -> None:
    """Let fp32 be fp32: by torch's default, convolutions on a GPU round their factors to 10 bits of mantissa."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def place(span: Span, layer_bytes: Sequence[int], room: Sequence[tuple[torch.device, int]]) -> Placement:
    """Fill one device after the other with consecutive layers; what does not fit goes to the CPU.

    layer_bytes: of all layers of the model; room: devices in the order of use, and bytes that weights may take there.
    """
    devices: list[torch.device] = []
    left = list(room)
    for layer in range(span.start, span.end):
        while left and left[0][1] < layer_bytes[layer]:
            left.pop(0)
        if not left:
            devices.append(CPU)
            continue
        device, free = left[0]
        left[0] = (device, free - layer_bytes[layer])
        devices.append(device)
    return Placement(span.start, tuple(devices))


def moved(value: Any, device: torch.device) -> Any:
    """Tensors in tuples, lists and dicts on a device; other objects (caches) as they are. A meta tensor stays one."""
    if isinstance(value, torch.Tensor):
        return value if value.device == device or value.device.type == "meta" else value.to(device)
    if type(value) in (tuple, list):
        return type(value)(moved(one, device) for one in value)
    if type(value) is dict:
        return {name: moved(one, device) for name, one in value.items()}
    return value


class Carried:
    """A module's forward behind a border: its arguments are moved to the module's device."""

    def __init__(self, forward: Callable[..., Any], device: torch.device) -> None:
        self._forward, self._device = forward, device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*moved(args, self._device), **moved(kwargs, self._device))


def move_buffers(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Put what modules computed when they were built (rotary tables, position ids) on a device."""
    for module in modules:
        for name in module._non_persistent_buffers_set:
            held = module._buffers.get(name)
            if held is not None:
                module._buffers[name] = moved(held, device)


def check_resident(module: nn.Module, layer: int, device: torch.device) -> None:
    """Raises ManifestError where a layer's weights are on another device: layers that share weights stay together."""
    for name, held in [*module.named_parameters(), *module.named_buffers()]:
        if held.device != device and held.device.type != "meta":
            raise ManifestError(
                f"layer {layer} shares {name} with layers on another device: this model runs on one device at a time;"
                ' set device = "cpu", or one that holds the whole span'
            )
