"""How this machine keeps weights for products, and multiplies by them, so that a row's bits depend on the row alone.

Products in machine code of our own come first (`native`): their bits are a rule's. Where there are none, oneDNN's over
weights packed once serve (the operators that torch.compile's freezing uses), whose bits are those of its kernels; where
those fail a self-test, too, nothing is packed. Which one it is decides bits, and so the class.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Protocol

import torch
import torch.nn.functional as F

from tallystick_model.canonical.native.products import Products, products
from tallystick_protocol.manifest import Numerics

ENOUGH_ROWS = 4
"""A product of fewer rows may take another kernel with other bits: of one row over weights packed by oneDNN, of up to
three over plain ones. Rows are repeated up to this, or up to `fewest_rows` where the machine was tried."""

PACKING_HINT = 4
"""Rows that oneDNN lays the packed weights out for: decode steps of a few sessions."""

Product = Callable[[torch.Tensor], torch.Tensor]


class Packing(Protocol):
    """One way to keep weights and to multiply. dtype: what a weight takes in memory."""

    def __hash__(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """weight (out, in), of any floating dtype -> a copy, packed."""
        ...

    def unpack(self, packed: torch.Tensor, columns: int, inputs: int) -> torch.Tensor:
        """The weight (out, in) float32, a copy."""
        ...

    def over(
        self, packed: torch.Tensor, bias: torch.Tensor | None, columns: int, inputs: int, rounds: bool
    ) -> Product:
        """x (..., in) float32, contiguous -> (..., out) float32, with a bias (out,) of any dtype.

        rounds: x and the result are rounded to bfloat16; a bias is then, too, already.
        """
        ...


@dataclass(frozen=True, slots=True)
class OneDnn:
    """oneDNN's packed products in one dtype."""

    dtype: torch.dtype

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.to(self.dtype), PACKING_HINT)
        return packed

    def unpack(self, packed: torch.Tensor, columns: int, inputs: int) -> torch.Tensor:
        return packed.to_dense().float()

    def over(
        self, packed: torch.Tensor, bias: torch.Tensor | None, columns: int, inputs: int, rounds: bool
    ) -> Product:
        product = torch.ops.mkldnn._linear_pointwise.default
        bias = None if bias is None else bias.to(self.dtype)
        if self.dtype is torch.bfloat16:
            return lambda x: product(x.bfloat16(), packed, bias, "none", [], "").float()
        if rounds:
            return lambda x: product(x.bfloat16().float(), packed, bias, "none", [], "").bfloat16().float()
        return lambda x: product(x, packed, bias, "none", [], "")


def packing(numerics: Numerics) -> Packing | None:
    """How this machine packs weights; None where it cannot, and products are plain.

    "bf16w" is packed in float32 where there are no packed operators in bfloat16 (oneDNN on CPUs without AVX-512): the
    values are the same, and take twice the memory.
    """
    wanted = (torch.bfloat16, torch.float32) if numerics == "bf16w" else (torch.float32,)
    found: Packing | None
    for dtype in wanted:
        if (found := products(dtype)) is not None and holds(found):
            return found
    for dtype in wanted:
        if holds(found := OneDnn(dtype)):
            return found
    return None


@cache
def holds(packing: Packing) -> bool:
    """Whether products are there, are right, and keep a row's bits at any number of rows."""
    try:
        values = (torch.arange(70 * 96, dtype=torch.float32) % 251 - 125) / 97
        values = values.bfloat16().float()
        rows, weight = values.view(70, 96), values.flip(0)[: 40 * 96].view(40, 96)
        product = packing.over(packing.pack(weight), None, 40, 96, False)
        whole = product(rows)
        if not torch.allclose(whole.double(), rows.double() @ weight.double().T, rtol=2**-7, atol=1e-2):
            return False
        return all(torch.equal(product(rows[at : at + n]), whole[at : at + n]) for at, n in ((0, 4), (3, 5), (5, 17)))
    except (RuntimeError, AttributeError):
        return False


@cache
def fewest_rows(packing: Packing) -> int:
    """How many rows a call with packed products has at least on this machine: the quickest number of those for which a
    row keeps its bits. The bits are those of `ENOUGH_ROWS`, so the class does not depend on it.

    Takes 0.1 s, once a process.
    """
    possible = [count for count in (1, 2) if bits_hold(count, packing)] + [ENOUGH_ROWS]
    if len(possible) == 1 or isinstance(packing, Products):
        return possible[0]
    width = _TIMED_WIDTH
    values = (torch.arange(width * width, dtype=torch.float32) % 251 - 125).view(width, width) / 97
    products, rows = [_bare(values, packing) for _ in range(2)], values[:ENOUGH_ROWS].clone()
    times: dict[int, list[int]] = {count: [] for count in possible}
    for _ in range(_TIMED_TURNS):
        for count, found in times.items():
            for product in products:  # together larger than most caches, as a model is
                began = time.perf_counter_ns()
                product(rows[:count])
                found.append(time.perf_counter_ns() - began)
    return min(possible, key=lambda count: sorted(times[count])[_TIMED_TURNS])


_TIMED_WIDTH, _TIMED_TURNS = 2048, 7


def bits_hold(count: int, packing: Packing) -> bool:
    """Whether calls of so many rows give a row the bits that it has among more: products, norms and softmax."""
    for outs, ins in ((40, 96), (768, 256), (256, 768), (1001, 1000), (2, 3072)):
        values = (torch.arange(outs * ins, dtype=torch.float32) % 8191 - 4095).view(outs, ins) / 1013
        rows = (torch.arange(16 * ins, dtype=torch.float32) % 4093 - 2046).view(16, ins) / 997
        functions = [_bare(values, packing)]
        functions += [partial(norm, normalized_shape=(ins,)) for norm in (F.layer_norm, F.rms_norm)]
        functions += [partial(torch.mean, dim=-1), partial(torch.softmax, dim=-1)]
        for function in functions:
            whole = function(rows)
            for at in (0, 5, 15 - count):
                if not torch.equal(function(rows[at : at + count]), whole[at : at + count]):
                    return False
    return True


def _bare(weight: torch.Tensor, packing: Packing) -> Product:
    """The product over a weight (out, in), at whatever number of rows it is given."""
    return packing.over(packing.pack(weight), None, weight.shape[0], weight.shape[1], False)
