"""A model without weights: its own transformers class, built by us, parameters on `meta`, buffers real, nothing drawn.

Tied parameters are untied here, so that every name stands for one place in the computation; who is tied to whom is
told apart from it (`Skeleton.ties`).
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights

from tallystick_model.config import build_config, model_class
from tallystick_protocol.errors import ManifestError

BUILD_ERRORS = (
    RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, MemoryError,
    ImportError,
)  # fmt: skip
"""What transformers raises over configs that make no sense."""

_building = threading.Lock()


@dataclass(frozen=True, slots=True)
class Skeleton:
    """model: an eval-mode transformers model, parameters and persistent buffers on meta.
    stack: the dotted name of its ModuleList of layers.
    ties: {name: the earlier name it shares its tensor with}, as the class and the config tie them.
    """

    model: Any
    config: Any
    stack: str
    ties: dict[str, str]

    @property
    def layers(self) -> nn.ModuleList:
        found = self.model.get_submodule(self.stack)
        assert isinstance(found, nn.ModuleList)
        return found

    @property
    def arguments(self) -> frozenset[str]:
        """The names that the model's forward takes."""
        return frozenset(inspect.signature(type(self.model).forward).parameters)

    def weights(self) -> dict[str, torch.Tensor]:
        """Every tensor that a checkpoint holds: parameters and persistent buffers, by name, shapes as they will be."""
        return named_weights(self.model)


def build_skeleton(config_values: dict[str, Any], architecture: str) -> Skeleton:
    """Build the model of a manifest's config. Raises ManifestError when it cannot be built or has no layer stack."""
    config = build_config(config_values)
    cls = model_class(config, architecture)
    config._attn_implementation = "sdpa" if cls._supports_sdpa else "eager"
    try:
        with _building, _parameters_on_meta(), no_init_weights():
            model = cls(config)
    except BUILD_ERRORS as error:
        raise ManifestError(f"{architecture} cannot be built from its config: {str(error)[:160]}") from None
    model.eval().requires_grad_(False)
    ties = _untie(model)
    _persistent_buffers_to_meta(model)
    return Skeleton(model, config, find_stack(model), ties)


def find_stack(model: Any) -> str:
    """The dotted name of the outermost ModuleList that holds most parameters. Raises ManifestError without one."""
    sizes = {
        name: sum(tensor.numel() for tensor in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    if not sizes:
        raise ManifestError(f"{type(model).__name__} has no list of layers to cut")
    # Modules come outermost first and `max` keeps the first of equals.
    return max(sizes, key=lambda name: sizes[name])


def named_weights(module: Any) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers of a module by dotted name."""
    weights = dict(module.named_parameters(remove_duplicate=False))
    for prefix, inner in module.named_modules():
        for name, buffer in inner._buffers.items():
            if buffer is not None and name not in inner._non_persistent_buffers_set:
                weights[f"{prefix}.{name}" if prefix else name] = buffer
    return weights


def set_weight(model: Any, name: str, value: torch.Tensor) -> None:
    """Put a tensor where a parameter or persistent buffer of that name is."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value


def _untie(model: Any) -> dict[str, str]:
    """Give every name a tensor of its own; returns {name: first name of the tensor it had or was to have}."""
    first: dict[int, str] = {}
    weights = named_weights(model)
    ties = {late: early for late, early in model.all_tied_weights_keys.items() if late in weights and early in weights}
    for name, tensor in list(weights.items()):
        if id(tensor) in first:
            ties[name] = first[id(tensor)]
            set_weight(model, name, torch.empty_like(tensor, device="meta"))
        else:
            first[id(tensor)] = name
    return ties


def _persistent_buffers_to_meta(model: Any) -> None:
    for name, tensor in named_weights(model).items():
        if tensor.device.type != "meta":
            set_weight(model, name, tensor.to("meta"))


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """While held, every parameter that a module registers goes to meta (as accelerate's init_empty_weights does).

    Its memory is never touched: modules fill their parameters after they have registered them.
    """
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None and param.device.type != "meta":
            self._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
