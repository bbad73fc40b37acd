"""The one module with torch-internal operators: products and elementwise functions whose bits for a row depend on
nothing but the row.

Products go through oneDNN over weights packed once (the operators that torch.compile's freezing uses). Where they are
missing or fail the self-test, plain products with enough rows serve. Elementwise functions run in blocks that ATen's
vectorised loop takes whole, on one thread. Measurements: docs/numerics.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2CLS
from transformers.pytorch_utils import Conv1D

from tallystick_model.canonical.recording import Traits, whole
from tallystick_protocol.manifest import Numerics

MAX_ROWS = 256
"""Rows per product. More are cut: what was measured is what is run."""

ENOUGH_ROWS = 4
"""A product of fewer rows may take another kernel with other bits: of one row over packed weights, of up to three over
plain ones. Rows are repeated up to this, or up to `fewest_rows` where the machine was tried."""

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


def _direct_product(linear: CanonicalLinear, x: torch.Tensor) -> tuple[Callable[..., Any], int] | None:
    """The packed product alone, where rows need be neither repeated nor cut nor computed together with others'."""
    rows = x.numel() // linear.in_features
    alone = linear.packed is not None and linear.within is None
    if not alone or not x.is_contiguous() or not linear.fewest <= rows <= MAX_ROWS:
        return None
    return linear.direct, 1


class CanonicalLinear(nn.Module):
    """x (..., in) -> (..., out), for nn.Linear and transformers' Conv1D; a row's bits do not depend on the others.

    numerics "fp32": all in fp32. "bf16w": weight, bias, x and the result are rounded to bf16 (to nearest, ties to
    even), products are added up in fp32; x and the result are handed over as fp32.

    packed: the dtype of the packed weight, None for a plain one; fewest: rows of a product.
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
        self.packed = packing(numerics) if packs and weight.device.type == "cpu" else None
        self.fewest = ENOUGH_ROWS if self.packed is None else fewest_rows(self.packed)
        if self.rounds:
            weight, bias = weight.bfloat16(), None if bias is None else bias.bfloat16()
        if self.packed is not None:
            bias = None if bias is None else bias.to(self.packed, copy=True)
            kept = torch.ops.mkldnn._reorder_linear_weight(weight.to(self.packed), PACKING_HINT)
        else:
            bias = None if bias is None else bias.to(torch.float32, copy=True)
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
        product, weight, bias = torch.ops.mkldnn._linear_pointwise.default, self.weight, self.bias
        if not self.rounds:
            return lambda x: product(x, weight, bias, "none", [], "")
        if self.packed is torch.bfloat16:
            return lambda x: product(x.bfloat16(), weight, bias, "none", [], "").float()
        return lambda x: product(x.bfloat16().float(), weight, bias, "none", [], "").bfloat16().float()

    def plain_weight(self) -> torch.Tensor:
        """(out, in) fp32; a copy where it is packed."""
        held, begin = self.within or (self, 0)
        weight = held.weight.to_dense() if held.packed is not None else held.weight
        return weight[begin : begin + self.out_features].float()

    def compute_within(self, joint: CanonicalLinear, begin: int) -> None:
        """From now on the product is columns of another one's, from `begin` on; its own weight is freed."""
        self.within, self.bias = (joint, begin), None
        self.weight = torch.empty(0)

    @whole(Traits(direct=_direct_product))
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.within is not None:
            joint, begin = self.within
            out: torch.Tensor = joint(x)[..., begin : begin + self.out_features].clone()
            return out
        rows = x.reshape(-1, self.in_features)
        if self.rounds:
            rows = rows.bfloat16()
        num_rows = rows.shape[0]
        if num_rows > MAX_ROWS:
            out = torch.cat([self._product(part) for part in rows.split(MAX_ROWS)])
        else:
            out = self._product(rows)
        return (out.float() if self.rounds else out).view(*x.shape[:-1], self.out_features)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        num_rows = rows.shape[0]
        if 0 < num_rows < self.fewest:
            rows = rows.repeat(-(-self.fewest // num_rows), 1)
        if self.packed is not None:
            rows = rows.to(self.packed).contiguous()
            out = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")
        else:
            out = F.linear(rows.float().contiguous(), self.weight)[:, : self.out_features]
            out = out if self.bias is None else out + self.bias
        return (out.bfloat16() if self.rounds else out)[:num_rows]  # type: ignore[no-any-return]


def packing(numerics: Numerics) -> torch.dtype | None:
    """In which dtype this machine packs weights; None where it cannot, and products are plain.

    "bf16w" is packed in fp32 where there are no such operators in bf16 (CPUs without AVX-512): the values are the
    same, and take twice the memory.
    """
    if numerics == "bf16w" and packed_operators_hold(torch.bfloat16):
        return torch.bfloat16
    return torch.float32 if packed_operators_hold(torch.float32) else None


@cache
def packed_operators_hold(dtype: torch.dtype) -> bool:
    """Whether the packed operators exist here and keep a row's bits at any number of rows."""
    try:
        values = (torch.arange(70 * 96, dtype=torch.float32) % 251 - 125) / 97
        rows, weight = values.view(70, 96), values.flip(0)[: 40 * 96].view(40, 96)
        product = _packed_product(weight, dtype)
        whole = product(rows)
        return all(torch.equal(product(rows[at : at + n]), whole[at : at + n]) for at, n in ((0, 4), (3, 5), (5, 17)))
    except (RuntimeError, AttributeError):
        return False


@cache
def fewest_rows(dtype: torch.dtype) -> int:
    """How many rows a call with packed products has at least on this machine: the quickest number of those for which a
    row keeps its bits. The bits are those of `ENOUGH_ROWS`, so the class does not depend on it.

    Takes 0.1 s, once a process.
    """
    possible = [count for count in (1, 2) if _bits_hold(count, dtype)] + [ENOUGH_ROWS]
    if len(possible) == 1:
        return ENOUGH_ROWS
    width = _TIMED_WIDTH
    values = (torch.arange(width * width, dtype=torch.float32) % 251 - 125).view(width, width) / 97
    products, rows = [_packed_product(values, dtype) for _ in range(2)], values[:ENOUGH_ROWS].clone()
    times: dict[int, list[int]] = {count: [] for count in possible}
    for _ in range(_TIMED_TURNS):
        for count, found in times.items():
            for product in products:  # together larger than most caches, as a model is
                began = time.perf_counter_ns()
                product(rows[:count])
                found.append(time.perf_counter_ns() - began)
    return min(possible, key=lambda count: sorted(times[count])[_TIMED_TURNS])


_TIMED_WIDTH, _TIMED_TURNS = 2048, 7


def _bits_hold(count: int, dtype: torch.dtype) -> bool:
    """Whether calls of so many rows give a row the bits that it has among more: products, norms and softmax."""
    for outs, ins in ((40, 96), (768, 256), (256, 768), (1001, 1000), (2, 3072)):
        values = (torch.arange(outs * ins, dtype=torch.float32) % 8191 - 4095).view(outs, ins) / 1013
        rows = (torch.arange(16 * ins, dtype=torch.float32) % 4093 - 2046).view(16, ins) / 997
        functions = [_packed_product(values, dtype)]
        functions += [partial(norm, normalized_shape=(ins,)) for norm in (F.layer_norm, F.rms_norm)]
        functions += [partial(torch.mean, dim=-1), partial(torch.softmax, dim=-1)]
        for function in functions:
            whole = function(rows)
            for at in (0, 5, 15 - count):
                if not torch.equal(function(rows[at : at + count]), whole[at : at + count]):
                    return False
    return True


def _packed_product(weight: torch.Tensor, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """The bare product over a packed weight (out, in), at whatever number of rows it is given."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), PACKING_HINT)
    product = torch.ops.mkldnn._linear_pointwise
    return lambda rows: product(rows.to(dtype).contiguous(), packed, None, "none", [], "")


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
