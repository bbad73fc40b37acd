"""Modules that call operators themselves (rotary tables, gates, routers): those operators run by the canonical rules.

Elementwise ones run in blocks. Products with a weight of the module's go through the same packed product as a linear
module's, fp32 in every numerics.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tallystick_model.canonical.kernels import CanonicalLinear, in_blocks
from tallystick_model.canonical.operators import BLOCKWISE, PRODUCTS

_WHOLE = frozenset(
    {"to", "reshape", "contiguous", "layer_norm", "rms_norm", "softmax", "log_softmax", "chunk", "flatten", "matmul",
     "linear", "dropout", "expand_as", "view_as", "type_as", "repeat_interleave", "scaled_dot_product_attention"}
)  # fmt: skip
"""Composite operators that are left whole: they hold nothing elementwise that is vectorised."""


@dataclass(frozen=True, slots=True)
class _Applied:
    """An elementwise operator and its arguments behind the first; calls with the same ones are the same function."""

    operator: Any
    rest: tuple[Any, ...]
    named: tuple[tuple[str, Any], ...]

    def __call__(self, block: torch.Tensor) -> torch.Tensor:
        out = self.operator(block.clone(), *self.rest, **dict(self.named))
        first: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return first


class CanonicalOperators(TorchDispatchMode):
    """While active, BLOCKWISE operators run in blocks (in-place ones write the result back), and products with one of
    `weights` are canonical."""

    def __init__(self, weights: dict[str, torch.Tensor] | None = None) -> None:
        super().__init__()
        self._storages = {
            held.untyped_storage().data_ptr() for held in (weights or {}).values() if held.device.type != "meta"
        }
        self._packed: dict[tuple[Any, ...], CanonicalLinear] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name.rstrip("_") in BLOCKWISE:
            if not isinstance(args[0], torch.Tensor) or _has_tensor(args[1:]) or not args[0].is_floating_point():
                return func(*args, **kwargs)
            out = in_blocks(_Applied(func, tuple(args[1:]), tuple(kwargs.items())), args[0])
            return args[0].copy_(out) if name.endswith("_") else out
        if name in PRODUCTS and self._is_weight(args[PRODUCTS[name]]):
            return self._product(name, args)
        if _decomposes(func):
            with self:
                return func.decompose(*args, **kwargs)
        return func(*args, **kwargs)

    def _is_weight(self, value: torch.Tensor) -> bool:
        return value.ndim == 2 and value.untyped_storage().data_ptr() in self._storages

    def _product(self, name: str, args: Any) -> torch.Tensor:
        """rows @ matrix: `linear` has the matrix turned, `addmm` and `linear` a bias."""
        matrix = args[PRODUCTS[name]]
        rows = args[1] if name == "addmm" else args[0]
        bias = args[0] if name == "addmm" else (args[2] if name == "linear" and len(args) > 2 else None)
        key = (name == "linear", matrix.data_ptr(), matrix.shape, matrix.stride())
        packed = self._packed.get(key)
        if packed is None:
            turned = matrix if name == "linear" else matrix.t()
            packed = self._packed[key] = CanonicalLinear(turned.float().contiguous(), None)
        out: torch.Tensor = packed(rows)
        return out if bias is None else out + bias


class CanonicalScope(nn.Module):
    """A module whose own operators run by the canonical rules; attributes fall through to it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.__dict__["operators"] = CanonicalOperators(dict(inner.named_parameters()))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.__dict__["operators"]:
            return self.inner(*args, **kwargs)


@cache
def _decomposes(func: Any) -> bool:
    """Whether an operator is made of others that may need a rule. In inference mode torch shows it whole."""
    return func._schema.name.partition("::")[2].rstrip("_") not in _WHOLE and bool(func._can_decompose())


def _has_tensor(values: Any) -> bool:
    return any(isinstance(value, torch.Tensor) for value in values)
