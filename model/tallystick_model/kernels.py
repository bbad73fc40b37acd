"""The one module with torch-internal operators: products and elementwise functions whose bits for a row depend on
nothing but the row.

Products go through oneDNN over weights packed once (the operators that torch.compile's freezing uses). Where they are
missing or fail the self-test, plain products with enough rows serve. Elementwise functions run in blocks that ATen's
vectorised loop takes whole, on one thread. Measurements: docs/numerics.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.activations import ACT2CLS
from transformers.pytorch_utils import Conv1D

from tallystick_model.operators import BLOCKWISE

MAX_ROWS = 256
"""Rows per product. More are cut: what was measured is what is run."""

MIN_ROWS = 4
"""A product of fewer rows takes another kernel with other bits: of one row over packed weights, of up to three over
plain ones. Rows are repeated up to this; four cost less than two (docs/numerics.md)."""

MIN_COLUMNS_PLAIN = 16
"""A plain product with one column takes a kernel for vectors; few columns are padded with zero weights."""

PACKING_HINT = 4
"""Rows that oneDNN lays the packed weights out for: decode steps of a few sessions."""

BLOCK = 32768
"""Elements per elementwise call: at::internal::GRAIN_SIZE, up to which ATen does not split work over threads."""

LANES = 64
"""Calls get a multiple of this many elements, so that there is no scalar tail: a multiple of two AVX-512 vectors."""


@contextmanager
def flushing_denormals() -> Iterator[None]:
    """While held, this thread (and worker threads that torch starts meanwhile) takes denormals for zero.

    Hostile denormals make products 26-200 x slower otherwise; afterwards the caller's arithmetic is as it was.
    """
    before = sys.float_info.min / 2 == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


class CanonicalLinear(nn.Module):
    """x (..., in) -> (..., out), for nn.Linear and transformers' Conv1D; a row's bits do not depend on the others."""

    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, packed: bool | None = None) -> None:
        """weight: (out, in), fp32; it is copied into the packed layout."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed = packed_operators_hold() if packed is None else packed
        if self.packed:
            kept = torch.ops.mkldnn._reorder_linear_weight(weight, PACKING_HINT)
        else:
            kept = F.pad(weight, (0, 0, 0, max(0, MIN_COLUMNS_PLAIN - self.out_features)))
        self.register_buffer("weight", kept, persistent=False)
        self.bias = bias

    @staticmethod
    def of(module: nn.Module) -> CanonicalLinear:
        """The canonical form of an nn.Linear or Conv1D."""
        if type(module) is Conv1D:
            return CanonicalLinear(module.weight.detach().t().contiguous(), module.bias.detach())
        assert isinstance(module, nn.Linear)
        bias = None if module.bias is None else module.bias.detach()
        return CanonicalLinear(module.weight.detach(), bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        num_rows = rows.shape[0]
        if num_rows > MAX_ROWS:
            out = torch.cat([self._product(part) for part in rows.split(MAX_ROWS)])
        else:
            out = self._product(rows)
        return out.view(*x.shape[:-1], self.out_features)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        num_rows = rows.shape[0]
        if 0 < num_rows < MIN_ROWS:
            rows = rows.repeat(-(-MIN_ROWS // num_rows), 1)
        if self.packed:
            out = torch.ops.mkldnn._linear_pointwise(rows.contiguous(), self.weight, self.bias, "none", [], "")
        else:
            out = F.linear(rows.contiguous(), self.weight)[:, : self.out_features]
            out = out if self.bias is None else out + self.bias
        return out[:num_rows]  # type: ignore[no-any-return]


@cache
def packed_operators_hold() -> bool:
    """Whether the packed operators exist here and keep a row's bits at any number of rows."""
    try:
        values = (torch.arange(70 * 96, dtype=torch.float32) % 251 - 125) / 97
        rows, weight = values.view(70, 96), values.flip(0)[: 40 * 96].view(40, 96)
        linear = CanonicalLinear(weight, None, packed=True)
        whole = linear(rows)
        return all(torch.equal(linear(rows[at : at + n]), whole[at : at + n]) for at, n in ((0, 1), (3, 2), (5, 17)))
    except (RuntimeError, AttributeError):
        return False


def in_blocks(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """function(x) for an elementwise function, every element computed by the vectorised loop."""
    flat = x.reshape(-1)
    size = flat.shape[0]
    padded = -(-size // LANES) * LANES
    if padded != size:
        flat = F.pad(flat, (0, padded - size))
    elif not flat.is_contiguous():
        flat = flat.contiguous()
    out = function(flat) if padded <= BLOCK else torch.cat([function(block) for block in flat.split(BLOCK)])
    return (out if padded == size else out[:size]).view(x.shape)


def _activation_types() -> frozenset[type]:
    named = (entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values())
    return frozenset(named) | {nn.SiLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.ELU, nn.Mish}


class BlockwiseActivation(nn.Module):
    """An elementwise activation module, run in blocks."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether a module is one of the activations by name, which all are elementwise, and has no weights."""
        return type(module) in _activation_types() and not list(module.parameters())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return in_blocks(self.inner, x)


class BlockwiseOperators(TorchDispatchMode):
    """While active, BLOCKWISE operators run in blocks; in-place ones write the result back."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name.rstrip("_") not in BLOCKWISE or not isinstance(args[0], torch.Tensor) or _has_tensor(args[1:]):
            return func(*args, **kwargs)
        out = in_blocks(lambda block: _fresh(func(block.clone(), *args[1:], **kwargs)), args[0])
        return args[0].copy_(out) if name.endswith("_") else out


class BlockwiseScope(nn.Module):
    """A module whose own operators run in blocks (rotary tables, gates); attributes fall through to it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with BlockwiseOperators():
            return self.inner(*args, **kwargs)


def _has_tensor(values: Any) -> bool:
    return any(isinstance(value, torch.Tensor) for value in values)


def _fresh(out: Any) -> torch.Tensor:
    first: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return first
