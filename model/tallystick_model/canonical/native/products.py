"""Products in machine code that is made for this processor when it is first needed.

One rule decides every bit: a row's value in a column is B0 + B1 + ... + bias, added in this order, where B is a block
of `BLOCK` inputs (the last one may be shorter), added up from zero in ascending order, one fused multiply-add each. How
many rows and columns are computed together, how wide vectors are and how many threads there are is left to speed: none
of it reaches the rule. So a row's bits are the same in every call and on every processor with fused multiply-add.

Weights are packed in panels of `PANEL` columns, each input's weights of a panel side by side: rows travel through a
panel while it passes through the cache. In bf16 two inputs' weights share 32 bits. Threads are libgomp's, torch's own,
and take panels one after the other, so that one that comes late makes nobody wait. Measurements: docs/numerics.md.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F

from tallystick_model.canonical.native.compiling import Compiled, address_of, if_possible, shared_from

PANEL = 64
"""Columns."""

BLOCK = 128
"""Inputs that are added up before they are added to the sum: even, and few enough to keep what is lost small."""

_SHARED_WORK = 1 << 18
"""Multiplications below which one thread computes."""


@dataclass(frozen=True, slots=True, eq=False)
class Products:
    """Products over weights of one dtype, float32 or bfloat16, which is what a weight takes in memory."""

    dtype: torch.dtype
    _pack: Callable[[int, int, int, int], None]
    _run: Callable[[int, int, int, int], None]

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """weight (out, in), of any floating dtype -> panels (ceil(out / 64), in, 64) float32, or (ceil(out / 64),
        ceil(in / 2), 128) bfloat16: two inputs' weights for each column. What is missing in the last panel is zero.

        The dtype is what it is in memory: models ask a weight for it.
        """
        columns, inputs = weight.shape
        weight = weight.to(self.dtype)
        if inputs % 2 and self.dtype is torch.bfloat16:
            weight = F.pad(weight, (0, 1))  # which copies
        weight = weight.contiguous()
        if self.dtype is torch.bfloat16:
            weight = weight.view(torch.int32)
        packed = torch.empty(-(-columns // PANEL), weight.shape[1], PANEL, dtype=weight.dtype)
        if columns % PANEL:
            packed[-1].zero_()
        self._pack(weight.data_ptr(), packed.data_ptr(), columns, weight.shape[1])
        return packed.view(self.dtype)

    def unpack(self, packed: torch.Tensor, columns: int, inputs: int) -> torch.Tensor:
        """The weight (out, in) float32, a copy."""
        words = packed.view(torch.int32)
        weight = words.transpose(1, 2).reshape(-1, words.shape[1])[:columns].contiguous()
        return weight.view(self.dtype)[:, :inputs].float()

    def over(
        self, packed: torch.Tensor, bias: torch.Tensor | None, columns: int, inputs: int, rounds: bool
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """x (..., in) float32, contiguous -> (..., out) float32, over this weight and a bias (out,).

        rounds: x and the result are rounded to bfloat16.
        """
        is_odd = self.dtype is torch.bfloat16 and inputs % 2 == 1
        padded = None if bias is None else F.pad(bias.float(), (0, packed.shape[0] * PANEL - columns))
        described = (ctypes.c_int64 * 5)(
            packed.data_ptr(), 0 if padded is None else padded.data_ptr(), inputs + is_odd, columns, packed.shape[0]
        )
        held = packed, padded, described
        return Over(columns, inputs, is_odd, rounds, ctypes.addressof(described), self._run, held)


@dataclass(frozen=True, slots=True, eq=False)
class Over:
    """x (..., inputs) float32, contiguous -> (..., columns) float32, over one weight.

    is_odd: whether rows are padded; rounds: whether they, and the result, are rounded to bfloat16. weight: where it is
    described in memory, while this lives.
    """

    columns: int
    inputs: int
    is_odd: bool
    rounds: bool
    weight: int
    _run: Callable[[int, int, int, int], None]
    _held: tuple[Any, ...]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.bfloat16().float() if self.rounds else x
        out, count = torch.empty((*x.shape[:-1], self.columns)), x.numel() // self.inputs
        if self.is_odd:
            x = F.pad(x, (0, 1))
        self._run(self.weight, x.data_ptr(), out.data_ptr(), count)
        return out.bfloat16().float() if self.rounds else out

    @property
    def address(self) -> int:
        """Of `product(weight*, x*, y*, rows)`."""
        return address_of(self._run)


@cache
def products(dtype: torch.dtype) -> Products | None:
    """The products of this processor over float32 or bfloat16 weights; None where there are none (`lanes`)."""
    return if_possible(partial(compiled, dtype))


def compiled(dtype: torch.dtype, width: int) -> Products:
    """The products with vectors of so many float32: 16 takes AVX-512. Takes some 0.2 s where it is not kept.

    Raises RuntimeError.
    """

    def make() -> Any:
        from tallystick_model.canonical.native.product_code import Layout, product_module

        layout = Layout(PANEL, BLOCK, width, halves=dtype is torch.bfloat16)
        return product_module(layout, shared_from(_SHARED_WORK))

    code = Compiled(f"products of {dtype}, {width} lanes", make, width)
    return Products(dtype, code.function("pack", 2, 2), code.function("product", 3, 1))
