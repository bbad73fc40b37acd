"""Building a model without its weights, and without making anything large on the way.

Constructors compute small tables (rotary frequencies, masks, sinusoidal positions) in real memory and register as many
modules as the config says. Both are counted while they happen, for no bound on single numbers of a config sees what
they come to together.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.initialization import no_init_weights

from tallystick_protocol.errors import ManifestError

MAX_TENSORS = 1 << 15
"""Parameters of a model, which take 0.2 ms each: NLLB-MoE of 54 G parameters has 6,800."""

MAX_VALUES = 1 << 43
"""Values of all parameters."""

MAX_MADE_BYTES = 1 << 32
"""What a constructor may compute: Zamba writes 2.6 GB while it makes 76 layers, GPT-Neo 0.4 GB of masks."""

MAX_TABLE_BYTES = 1 << 28
"""What is made larger than this at once will be a parameter, and is made on meta: DeepSeek-V3 has experts of 30 GB."""

_ATEN = torch.ops.aten
_FACTORIES = {
    _ATEN.empty.memory_format, _ATEN.zeros.default, _ATEN.ones.default, _ATEN.full.default, _ATEN.rand.default,
    _ATEN.randn.default,
}  # fmt: skip
_UNTOUCHED = {_ATEN.empty.memory_format, _ATEN.empty_strided.default, _ATEN.new_empty.default, _ATEN.empty_like.default}
"""Memory that is taken and never written to costs nothing."""

_building = threading.Lock()


@contextmanager
def weightless(dtype: torch.dtype) -> Iterator[None]:
    """While held, by one thread at a time, modules are made in `dtype`, nothing is drawn, and parameters go to meta.

    A parameter's memory is never touched: modules fill their parameters after they have registered them (as under
    accelerate's init_empty_weights). Raises ManifestError in the middle of a constructor that makes too much.
    """
    with _building:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with _parameters_on_meta(), no_init_weights(), _Budget():
                yield
        finally:
            torch.set_default_dtype(before)


def expect_tables(model: nn.Module) -> None:
    """Raises ManifestError when one of a model's tables, which it computes and no checkpoint holds, was too large."""
    for prefix, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.device.type == "meta":
                shape = tuple(buffer.shape)
                raise ManifestError(f"the config makes a table {prefix}.{name} of {shape}, which is too large")


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    register, tensors, values = nn.Module.register_parameter, 0, 0

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        nonlocal tensors, values
        register(self, name, param)
        if param is None:
            return
        tensors, values = tensors + 1, values + param.numel()
        if tensors > MAX_TENSORS or values > MAX_VALUES:
            raise ManifestError(f"the config makes more than {MAX_TENSORS} weights, or {MAX_VALUES} values of them")
        if param.device.type != "meta":
            self._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class _Budget(TorchDispatchMode):
    """Counts the bytes that operators are about to write in real memory, and stops the one that would be too many."""

    def __init__(self) -> None:
        super().__init__()
        self._left = MAX_MADE_BYTES

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES and math.prod(args[0]) * _widest(kwargs) > MAX_TABLE_BYTES:
            return func(*args, **{**kwargs, "device": "meta"})
        if func not in _UNTOUCHED and not func.is_view and not _is_on_meta(kwargs):
            self._left -= _bytes_written(func, args, kwargs)
            if self._left < 0:
                raise ManifestError(f"the config makes tables of more than {MAX_MADE_BYTES} bytes")
        return func(*args, **kwargs)


def _widest(options: dict[str, Any]) -> int:
    return (options.get("dtype") or torch.get_default_dtype()).itemsize  # type: ignore[no-any-return]


def _is_on_meta(options: dict[str, Any]) -> bool:
    return options.get("device") is not None and torch.device(options["device"]).type == "meta"


def _bytes_written(func: Any, args: Any, kwargs: dict[str, Any]) -> int:
    """What an operator's result takes outside of meta; found on meta, before there is one."""
    held = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if next((tensor.device.type for tensor in held if tensor.ndim), "cpu") == "meta":
        return 0
    if func._schema.is_mutable:
        return max((tensor.nbytes for tensor in held if tensor.device.type != "meta"), default=0)
    blank, options = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
    if any(argument.name == "device" for argument in func._schema.arguments):
        options = {**options, "device": "meta"}
    try:
        made = func(*blank, **options)
    except (RuntimeError, NotImplementedError):  # its result's size depends on values: no larger than what it reads
        return sum(tensor.nbytes for tensor in held)
    return sum(leaf.nbytes for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor))
