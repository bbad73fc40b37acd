"""The one module with torch-internal operators: products and elementwise functions whose bits for a row depend on
nothing but the row.

Products go over weights packed once (`products.py`). Where this machine has none that pass the self-test, plain
products with enough rows serve. Elementwise functions run in blocks that ATen's vectorised loop takes whole, on one
thread. Measurements: docs/numerics.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2CLS
from transformers.pytorch_utils import Conv1D

from tallystick_model.canonical.products import ENOUGH_ROWS, fewest_rows, packing
from tallystick_model.canonical.recording import Traits, whole
from tallystick_protocol.manifest import Numerics

MAX_ROWS = 256
"""Rows per product. More are cut: what was measured is what is run."""

MIN_COLUMNS_PLAIN = 16
"""A plain product with one column takes a kernel for vectors; few columns are padded with zero weights."""

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


def _direct_product(linear: CanonicalLinear, x: torch.Tensor) -> tuple[Callable[..., Any], int] | None:
    """The packed product alone, where rows need be neither repeated nor cut nor computed together with others'."""
    rows = x.numel() // linear.in_features
    alone = linear.packing is not None and linear.within is None
    if not alone or not x.is_contiguous() or not linear.fewest <= rows <= MAX_ROWS:
        return None
    return linear.direct, 1


class CanonicalLinear(nn.Module):
    """x (..., in) -> (..., out), for nn.Linear and transformers' Conv1D; a row's bits do not depend on the others.

    numerics "fp32": all in fp32. "bf16w": weight, bias, x and the result are rounded to bf16 (to nearest, ties to
    even), products are added up in fp32; x and the result are handed over as fp32.

    packing: how the weight is packed, None for a plain one; fewest: rows of a product.
    within: the product over the same rows that it is computed in, and its first column there (`joining.py`).
    """

    weight: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        numerics: Numerics = "fp32",
        packs: bool = True,
    ) -> None:
        """weight: (out, in), bias (out,), as they are stored; both are copied. packs: if this machine can."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.rounds = numerics == "bf16w"
        self.packing = packing(numerics) if packs and weight.device.type == "cpu" else None
        self.fewest = ENOUGH_ROWS if self.packing is None else fewest_rows(self.packing)
        if self.rounds:
            weight, bias = weight.bfloat16(), None if bias is None else bias.bfloat16()
        bias = None if bias is None else bias.to(torch.float32, copy=True)
        if self.packing is not None:
            kept = self.packing.pack(weight)
        else:
            kept = F.pad(weight.float(), (0, 0, 0, max(0, MIN_COLUMNS_PLAIN - self.out_features)))
        self.register_buffer("weight", kept, persistent=False)
        self.bias = bias
        self.within: tuple[CanonicalLinear, int] | None = None

    @staticmethod
    def of(module: nn.Module, numerics: Numerics = "fp32") -> CanonicalLinear:
        """The canonical form of an nn.Linear or Conv1D."""
        bias = None if module.bias is None else module.bias.detach()  # type: ignore[union-attr,operator]
        weight = module.weight.detach()  # type: ignore[union-attr,operator]
        weight = weight.t().contiguous() if type(module) is Conv1D else weight
        return CanonicalLinear(weight, bias, numerics=numerics)

    @property
    def direct(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The packed product alone, of `fewest` to MAX_ROWS rows that lie side by side."""
        return self._over_weight()

    def _over_weight(self) -> Callable[[torch.Tensor], torch.Tensor]:
        known: tuple[int, Callable[[torch.Tensor], torch.Tensor]] = self.__dict__.get("product", (0, None))
        if known[0] == id(self.weight):
            return known[1]
        assert self.packing is not None
        product = self.packing.over(self.weight, self.bias, self.out_features, self.in_features, self.rounds)
        self.__dict__["product"] = id(self.weight), product  # which keeps the weight, and so its id
        return product

    def plain_weight(self) -> torch.Tensor:
        """(out, in) fp32; a copy where it is packed."""
        held, begin = self.within or (self, 0)
        if held.packing is None:
            weight = held.weight.float()
        else:
            weight = held.packing.unpack(held.weight, held.out_features, held.in_features)
        return weight[begin : begin + self.out_features]

    def compute_within(self, joint: CanonicalLinear, begin: int) -> None:
        """From now on the product is columns of another one's, from `begin` on; its own weight is freed."""
        self.within, self.bias = (joint, begin), None
        self.weight = torch.empty(0)
        self.__dict__.pop("product", None)

    @whole(Traits(direct=_direct_product))
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.within is not None:
            joint, begin = self.within
            out: torch.Tensor = joint(x)[..., begin : begin + self.out_features].clone()
            return out
        rows = x.reshape(-1, self.in_features)
        if rows.shape[0] > MAX_ROWS:
            out = torch.cat([self._product(part) for part in rows.split(MAX_ROWS)])
        else:
            out = self._product(rows)
        return out.view(*x.shape[:-1], self.out_features)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        num_rows = rows.shape[0]
        if 0 < num_rows < self.fewest:
            rows = rows.repeat(-(-self.fewest // num_rows), 1)
        rows = rows.float().contiguous()
        if self.packing is not None:
            return self._over_weight()(rows)[:num_rows]
        out = F.linear(rows.bfloat16().float() if self.rounds else rows, self.weight)[:, : self.out_features]
        out = out if self.bias is None else out + self.bias
        return (out.bfloat16().float() if self.rounds else out)[:num_rows]


def _direct_function(function: Callable[..., Any], x: torch.Tensor) -> tuple[Callable[..., Any], int] | None:
    """The function alone, where its argument is one block."""
    if not x.is_contiguous() or x.numel() % LANES or x.numel() > BLOCK:
        return None
    return (function.forward if isinstance(function, nn.Module) else function), 1


@whole(Traits(direct=_direct_function))
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
