"""A model without weights: its own transformers class, built by us, parameters on `meta`, buffers real, nothing drawn.

Tied parameters are untied here, so that every name stands for one place in the computation; who is tied to whom is
told apart from it (`Skeleton.ties`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tallystick_model.architectures import model_class
from tallystick_model.config import build_config
from tallystick_model.config_keys import KEPT
from tallystick_model.weightless import expect_tables, weightless
from tallystick_protocol.errors import ManifestError

BUILD_ERRORS = (
    RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, MemoryError,
    ImportError,
)  # fmt: skip
"""What transformers raises over configs that make no sense."""


@dataclass(frozen=True, slots=True)
class Skeleton:
    """model: an eval-mode transformers model, parameters and persistent floating-point buffers on meta.
    stacks: the dotted names of its ModuleLists of layers: one, or the encoder's and the decoder's.
    ties: {name: the earlier name it shares its tensor with}, as the class and the config tie them.
    """

    model: Any
    config: Any
    stacks: tuple[str, ...]
    ties: dict[str, str]

    @property
    def layers(self) -> list[nn.Module]:
        """The layers of all stacks, encoder first."""
        return [layer for index in range(len(self.stacks)) for layer in self.stack(index)]

    def stack(self, index: int) -> nn.ModuleList:
        found = self.model.get_submodule(self.stacks[index])
        assert isinstance(found, nn.ModuleList)
        return found

    def runner(self, index: int) -> Any:
        """The module whose forward runs a stack: the encoder for the first of two, else the model."""
        return self.model.get_encoder() if len(self.stacks) > 1 and index == 0 else self.model

    @property
    def arguments(self) -> frozenset[str]:
        """The names that the model's forward takes."""
        return arguments_of(self.model)

    def weights(self) -> dict[str, torch.Tensor]:
        """Every tensor that a checkpoint holds: parameters and persistent buffers, by name, shapes as they will be."""
        return named_weights(self.model)


def arguments_of(module: Any) -> frozenset[str]:
    """The names that a module's forward takes."""
    return frozenset(inspect.signature(type(module).forward).parameters)


def build_skeleton(
    config_values: dict[str, Any],
    architecture: str,
    labels: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
) -> Skeleton:
    """Build the model of a manifest's config.

    labels: of a classifier, whose head has a row for each. dtype: what its parameters and buffers are made in.
    Raises ManifestError when it cannot be built or has no layer stack.
    """
    config = build_config(config_values)
    cls = model_class(config, architecture)
    if labels:
        config.num_labels = len(labels)
    try:
        with weightless(dtype):
            model = cls(config)
        expect_tables(model)
        model.eval().requires_grad_(False)
        _settle_dtypes(model, dtype)
        ties = _untie(model)
        if KEPT.keys() & config_values.keys() and config_values.get("tie_word_embeddings") is False:
            head = id(model.get_output_embeddings())
            own = {f"{name}.weight" for name, module in model.named_modules() if id(module) == head}
            ties = {late: early for late, early in ties.items() if late not in own}
        _persistent_buffers_to_meta(model)
        stacks = find_stacks(model)
    except BUILD_ERRORS as error:
        raise ManifestError(f"{architecture} cannot be built from its config: {str(error)[:160]}") from None
    return Skeleton(model, model.config, stacks, ties)


def configs_of(model: Any) -> list[Any]:
    """The config objects that a model's modules read; some models give their parts copies."""
    found = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return list(found.values())


def find_stacks(model: Any) -> tuple[str, ...]:
    """The dotted names of the layer stacks. Raises ManifestError when there is none."""
    if not getattr(model.config, "is_encoder_decoder", False):
        return (_find_stack(model, model),)
    encoder, decoder = model.get_encoder(), model.get_decoder()
    if encoder is None or decoder is None or encoder is decoder or decoder is model:
        return (_find_stack(model, model),)
    return _find_stack(model, encoder), _find_stack(model, decoder)


def _find_stack(model: Any, within: Any) -> str:
    """The outermost ModuleList in `within` that holds most parameters, by its name in the model.

    Lists inside a tower for images or sound, which has a config of its own class, count only where there is no other.
    """
    lists = {
        name: module
        for name, module in within.named_modules()
        if isinstance(module, nn.ModuleList) and any(True for _ in module.parameters())
    }
    if not lists:
        raise ManifestError(f"{type(within).__name__} has no list of layers to cut")
    textual = {name: module for name, module in lists.items() if _reads_text(within, name)} or lists
    sizes = {name: sum(tensor.numel() for tensor in module.parameters()) for name, module in textual.items()}
    # Modules come outermost first and `max` keeps the first of equals.
    largest = textual[max(sizes, key=lambda name: sizes[name])]
    return next(name for name, module in model.named_modules() if module is largest)


def _reads_text(within: Any, name: str) -> bool:
    """Whether the module at `name` is governed by the config of `within` or by its text config."""
    module, config = within, getattr(within, "config", None)
    if config is None:
        return True
    text = config.get_text_config()
    for part in name.split(".")[:-1]:
        module = getattr(module, part)
        config = getattr(module, "config", config)
    return type(config) in (type(within.config), type(text))


def named_weights(module: Any) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers of a module by dotted name."""
    weights = dict(module.named_parameters(remove_duplicate=False))
    for prefix, inner in module.named_modules():
        for name, buffer in inner._buffers.items():
            if buffer is not None and name not in inner._non_persistent_buffers_set:
                weights[f"{prefix}.{name}" if prefix else name] = buffer
    return weights


def set_weight(model: Any, name: str, value: torch.Tensor) -> None:
    """Put a tensor where a parameter or persistent buffer of that name is, in its dtype."""
    owner, _, leaf = name.rpartition(".")
    _replace_tensor(model, name, value.to(getattr(model.get_submodule(owner), leaf).dtype))


class Lent:
    """A weight that stands in a model as it is stored, perhaps in the mapping of a file, until its module is packed."""

    def __init__(self, model: Any, name: str, stored: str, value: torch.Tensor) -> None:
        """stored: the name under which the value is in its piece."""
        self._stored, self._model, self._name = stored, model, name
        self._path, _, self._leaf = name.rpartition(".")
        self._owner = model.get_submodule(self._path)
        self._dtype: torch.dtype = getattr(self._owner, self._leaf).dtype
        _replace_tensor(model, name, value)

    def keep(self, copies: dict[Any, torch.Tensor]) -> None:
        """Where its module still holds it: in the model's dtype and memory of its own. copies: those of this piece, for
        what stands under several names is kept once."""
        held = self._owner._parameters.get(self._leaf, self._owner._buffers.get(self._leaf))
        if held is None or held.is_meta or self._model.get_submodule(self._path) is not self._owner:
            return
        key = (self._stored, held.device, self._dtype)
        if key not in copies:
            copies[key] = held.detach().to(self._dtype, copy=held.device.type == "cpu")
        _replace_tensor(self._model, self._name, copies[key])


def _replace_tensor(model: Any, name: str, value: torch.Tensor) -> None:
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
            _replace_tensor(model, name, torch.empty_like(tensor, device="meta"))
        else:
            first[id(tensor)] = name
    return ties


def _settle_dtypes(model: Any, dtype: torch.dtype) -> None:
    """Every weight in `dtype`, but for those that the class wants in fp32 whatever the others are in."""
    kept = [rf"(^|\.){pattern}(\.|$)" for pattern in model._keep_in_fp32_modules_strict or ()]
    for name, tensor in named_weights(model).items():
        wanted = torch.float32 if any(re.search(pattern, name) for pattern in kept) else dtype
        if tensor.is_floating_point() and tensor.dtype is not wanted:
            _replace_tensor(model, name, tensor.to(wanted))


def _persistent_buffers_to_meta(model: Any) -> None:
    for name, tensor in named_weights(model).items():
        if tensor.device.type != "meta" and tensor.is_floating_point():
            _replace_tensor(model, name, tensor.to("meta"))
