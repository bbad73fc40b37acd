"""A tape: steps over float32 values in memory, written once and run in machine code by one call.

The small operators of a layer take microseconds each to call and next to nothing to compute. What is written here is
what ATen computes, bit for bit: elements by themselves; means in the order of its sums; its own exponential function.
Products and attention, which have code of their own, are steps as well.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tallystick_model.canonical.native import attention
from tallystick_model.canonical.native.attention import Attention
from tallystick_model.canonical.native.compiling import Compiled, has, if_possible
from tallystick_model.canonical.native.products import Over

_Machine = Callable[[int, int, int], None]

UNARY = ("copy", "neg", "square", "rsqrt", "round")
BINARY = ("add", "sub", "mul", "div")
"""What becomes of every element by itself."""

OPERANDS, DIMS = 4, 4
FIELDS = 23
FIRST_SIZE, FIRST_STRIDE, ONCE_MORE = 9, 13, 22
"""Of a record, 64-bit numbers: its kind; a base and an offset in bytes for each operand, the result first; sizes of the
loops, the last one over what lies side by side; how many bytes apart each operand's values are in all loops but the
last; the address of a function. Products and attention have their own numbers where sizes and strides are."""

SHORTEST_MEAN = 8
"""ATen adds up shorter rows one by one."""

MEAN_LIMIT = 16 * 16 * 4 * 8
"""Longer rows are summed in more levels."""


class Kind:
    """Of a record."""

    MEAN, SILU, PRODUCT, ATTEND = range(64, 68)


def kind_of(name: str, spread: Sequence[bool] = (False,)) -> int:
    """spread: of each operand, whether one element serves for all that lie side by side."""
    if name in UNARY:
        return UNARY.index(name)
    return 16 + 4 * BINARY.index(name) + spread[0] + 2 * spread[1]


@dataclass(frozen=True, slots=True)
class Seen:
    """Float32 values in memory: `offset` bytes behind the place that `base` stands for, strides in elements."""

    base: Hashable
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def count(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def is_contiguous(self) -> bool:
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True

    def spread_to(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Its strides where it is broadcast to a shape; None if it cannot be."""
        missing = len(shape) - len(self.shape)
        if missing < 0:
            return None
        sizes, strides = (1,) * missing + self.shape, (0,) * missing + self.strides
        if any(size not in (1, wanted) for size, wanted in zip(sizes, shape, strict=True)):
            return None
        return tuple(0 if size == 1 else stride for size, stride in zip(sizes, strides, strict=True))


@dataclass(frozen=True, slots=True)
class Exponential:
    """An exponential function of so many float32 at once, by its address."""

    width: int
    address: int


class Tape:
    """What is being written. Each method says whether the step could be written down."""

    def __init__(self) -> None:
        self._records: list[tuple[list[int], list[Seen]]] = []
        self._held: list[Any] = []

    def __len__(self) -> int:
        return len(self._records)

    def cut(self, length: int) -> None:
        """Forget what was written behind so many records."""
        del self._records[length:]

    @property
    def operands(self) -> list[list[Seen]]:
        """Of each record, the result first."""
        return [operands for _, operands in self._records]

    def elementwise(self, name: str, out: Seen, *given: Seen) -> bool:
        loops = _loops(out, given)
        if loops is None:
            return False
        sizes, strides = loops
        spread = [stride[-1] == 0 for stride in strides[1:]]
        if strides[0][-1] != 1 or any(stride[-1] not in (0, 1) for stride in strides) or all(spread):
            return False
        numbers = [*sizes, *(4 * number for stride in strides for number in stride[:-1])]
        self._add(kind_of(name, spread), [out, *given], numbers)
        return True

    def mean(self, out: Seen, x: Seen) -> bool:
        """Over the last dimension."""
        size = x.shape[-1]
        if not (x.is_contiguous and out.is_contiguous) or not SHORTEST_MEAN <= size < MEAN_LIMIT:
            return False
        self._add(Kind.MEAN, [out, x], [x.count // size, size])
        return True

    def silu(self, out: Seen, x: Seen, exponential: Exponential) -> bool:
        """exponential: ATen's (`exponential()`)."""
        if not (x.is_contiguous and out.is_contiguous) or x.count % exponential.width:
            return False
        self._add(Kind.SILU, [out, x], [x.count], exponential.address)
        return True

    def product(self, out: Seen, x: Seen, over: Over) -> bool:
        """One that rounds nothing."""
        if over.is_odd or not (x.is_contiguous and out.is_contiguous):
            return False
        self._held.append(over)
        self._add(Kind.PRODUCT, [out, x], [over.weight, x.count // over.inputs], over.address)
        return True

    def attend(self, out: Seen, sides: Sequence[Seen], code: Attention, *form: Any) -> Any | None:
        """sides: query, key, value; form: scale, sinks. The task, to be `place`d before each run; None if it cannot be
        written down."""
        if any(side.strides[-1] != 1 for side in sides) or not out.is_contiguous:
            return None
        query, key, _ = sides
        (_, q_head, q_row, _), (_, k_group, k_row, _), (_, v_group, v_row, _) = (side.strides for side in sides)
        rows = (query.shape[1], q_head, q_row), (key.shape[1], k_group, k_row), (v_group, v_row)
        task = code.task(*rows, *form)
        self._held += [code, task, form]
        fields = attention.OUT, attention.QUERY, attention.KEY, attention.VALUE
        self._add(Kind.ATTEND, [out, *sides], [task.ctypes.data, *fields], code.address)
        return task

    def finished(
        self, places: Mapping[Hashable, tuple[int, int]], machine: _Machine | None = None
    ) -> Callable[[int], None]:
        """Runs all steps, given where an array of addresses is in memory. places: of each base, the number of an
        address in there, and how many bytes behind it it is. machine: what runs them, unless it is this processor's."""
        machine = machine or _machine()
        assert machine is not None
        records = np.zeros((len(self._records), FIELDS), dtype=np.int64)
        for record, (numbers, operands) in zip(records, self._records, strict=True):
            record[:] = numbers
            for at, operand in enumerate(operands):
                number, offset = places[operand.base]
                record[1 + 2 * at : 3 + 2 * at] = number, offset + operand.offset
        begin, count = records.ctypes.data, len(records)

        def run(addresses: int, _: Any = (records, self._held)) -> None:
            machine(begin, addresses, count)

        return run

    def _add(self, kind: int, operands: list[Seen], numbers: Sequence[int], address: int = 0) -> None:
        record = [0] * FIELDS
        record[0], record[ONCE_MORE] = kind, address
        record[FIRST_SIZE : FIRST_SIZE + len(numbers)] = numbers
        self._records.append((record, operands))


def _loops(out: Seen, given: Sequence[Seen]) -> tuple[list[int], list[list[int]]] | None:
    """Sizes of DIMS loops through a result, and each operand's strides in them, the result's first."""
    spread = [one.spread_to(out.shape) for one in given]
    if any(one is None for one in spread):
        return None
    through = [out.strides, *(one for one in spread if one is not None)]
    dims = sorted((dim for dim, size in enumerate(out.shape) if size != 1), key=lambda dim: -out.strides[dim])
    sizes: list[int] = []
    strides: list[tuple[int, ...]] = []
    for dim in dims:
        size, here = out.shape[dim], tuple(one[dim] for one in through)
        if sizes and all(before == size * now for before, now in zip(strides[-1], here, strict=True)):
            sizes[-1], strides[-1] = sizes[-1] * size, here
        else:
            sizes.append(size)
            strides.append(here)
    if not sizes:
        sizes, strides = [1], [(1,) * len(through)]
    missing = DIMS - len(sizes)
    if missing < 0:
        return None
    strides = [(0,) * len(through)] * missing + strides
    return [1] * missing + sizes, [list(one) for one in zip(*strides, strict=True)]


@cache
def exponential() -> Exponential | None:
    """ATen's own, if what is made of it is what ATen makes."""
    return if_possible(_tried_exponential)


def _tried_exponential(width: int) -> Exponential:
    if width == 8 and not has("avx2"):
        raise RuntimeError("torch's exponential functions are for AVX2")
    name = {16: "Sleef_expf16_u10", 8: "Sleef_expf8_u10avx2"}[width]
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    try:
        address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    except AttributeError:
        raise RuntimeError(f"torch has no {name}") from None
    assert address is not None
    found = Exponential(width, address)
    if not _is_atens(found):
        raise RuntimeError(f"torch does not use its {name}")
    return found


def _is_atens(exponential: Exponential) -> bool:
    """Whether SiLU with it has the bits of ATen's."""
    x = torch.linspace(-120, 120, 1 << 14)
    return _makes(torch.nn.functional.silu(x), lambda tape, out, x: tape.silu(out, x, exponential), x)


def _makes(
    expected: torch.Tensor, write: Callable[..., bool], *given: torch.Tensor, machine: _Machine | None = None
) -> bool:
    """Whether the step that `write(tape, out, *given)` writes down has these bits."""
    made = torch.empty_like(expected)
    tape, tensors = Tape(), [made, *given]
    seen = [Seen(at, 0, tuple(one.shape), tuple(one.stride())) for at, one in enumerate(tensors)]
    if not write(tape, *seen):
        return False
    addresses = np.array([one.data_ptr() for one in tensors], dtype=np.int64)
    tape.finished({at: (at, 0) for at in range(len(tensors))}, machine)(addresses.ctypes.data)
    return torch.equal(made.view(torch.int32), expected.view(torch.int32))


@cache
def _machine() -> _Machine | None:
    """`run` of this processor; None where there is no machine code, or it does not compute what ATen does."""
    return if_possible(_tried)


def compiled(width: int) -> _Machine:
    """width: float32 in the vectors that an exponential function takes. Raises RuntimeError."""

    def make() -> Any:
        from tallystick_model.canonical.native.tape_code import tape_module

        return tape_module(width)

    return Compiled(f"tape, {width} lanes", make, width).function("run", 2, 1)


def _tried(width: int) -> _Machine:
    machine = compiled(width)
    if not _computes_as_aten(machine):
        raise RuntimeError("ATen computes small operators otherwise")
    return machine


def _computes_as_aten(machine: _Machine) -> bool:
    """Whether every kind of step has the bits that ATen's operators have, on numbers large, small and next to none."""
    drawn = torch.Generator().manual_seed(0)
    for size in (8, 33, 515, 768, MEAN_LIMIT - 1):
        x = torch.randn(7, size, generator=drawn)
        x[1] *= 1e-38  # some of them are no normal numbers
        x[2] *= 1e30
        y, column = torch.randn(7, size, generator=drawn), torch.randn(7, 1, generator=drawn)
        squared = x.square()
        alone = {"square": (x.pow(2), x), "copy": (x, x), "neg": (-x, x), "rsqrt": (squared.rsqrt(), squared)}
        alone["round"] = x.bfloat16().float(), x
        makes = partial(_makes, machine=machine)
        right = makes(squared.mean(-1, keepdim=True), Tape.mean, squared)
        right = right and all(makes(found, partial(_one_by_one, name), of) for name, (found, of) in alone.items())
        for name in BINARY:
            for pair in ((x, y), (x, column), (column, x)):
                right = right and makes(getattr(torch, name)(*pair), partial(_one_by_one, name), *pair)
        if not right:
            return False
    return True


def _one_by_one(name: str, tape: Tape, out: Seen, *given: Seen) -> bool:
    return tape.elementwise(name, out, *given)


def is_possible() -> bool:
    """Whether there is machine code for tapes."""
    return _machine() is not None
