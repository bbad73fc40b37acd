"""Steps of a straight list that a tape (`native/tape.py`) computes: which they are, and where their values lie.

Values that only such steps use lie in one piece of memory that all lists of a program share, and places in it are used
again as soon as a value is done with: what a list works on stays in the cache. What other steps take is handed to them
as views.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_unflatten
from transformers.activations import SiLUActivation

from tallystick_model.canonical.attention import TiledSeat
from tallystick_model.canonical.native.products import Over
from tallystick_model.canonical.native.tape import Seen, Tape, exponential
from tallystick_model.canonical.recording import Step, Value

MOST_BYTES = 8 << 20
"""Lists that need more memory than this are of many rows: their steps take longer than their calls."""

_ALIGNED = 64
_SCRATCH, _CONSTANTS, _FIRST = range(3)
"""Addresses: of the scratch memory, 0, then those of tensors that other steps made."""

_COPIES = frozenset({"clone.default", "contiguous.default"})

_ELEMENTWISE = {"neg.default": "neg", "rsqrt.default": "rsqrt"} | {
    f"{name}.Tensor": name for name in ("add", "sub", "mul", "div")
}


def columns(rows: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    return rows[..., begin:end].contiguous()


class Scratch:
    """Memory for one list at a time."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)
        self._users: WeakSet[Taped] = WeakSet()

    def need(self, size_bytes: int, user: Taped) -> torch.Tensor:
        """When it grows, nobody keeps what it was before."""
        if self._memory.numel() * 4 < size_bytes:
            for other in self._users:
                other.let_go()
            self._users.clear()
            self._memory = torch.empty(max(-(-size_bytes // 4), 2 * self._memory.numel()))
        self._users.add(user)
        return self._memory


@dataclass(slots=True, eq=False)
class Stretch:
    """Steps that follow each other and are one call of a tape.

    places: what attention needs before each run. takes: values that others have made, and which of the addresses they
    are; gives: values that others take.
    """

    tape: Tape = field(default_factory=Tape)
    places: list[Callable[[], None]] = field(default_factory=list)
    takes: dict[int, int] = field(default_factory=dict)
    gives: dict[int, Seen] = field(default_factory=dict)


class Writer:
    """Writes the steps of one list, in their order, to as few tapes as can be."""

    def __init__(self, forms: dict[int, torch.Tensor], varying: set[int]) -> None:
        """forms: of values, as `Learnt` has them; varying: those of another size from call to call."""
        self.parts: list[Step | Stretch] = []
        self._forms, self._varying = forms, varying
        self._seen: dict[int, Seen] = {}  # what tapes know: their own values, and views
        self._makers: dict[Hashable, Stretch] = {}
        self._sizes: dict[Hashable, int] = {}  # bytes of what lies in the scratch memory
        self._constants: dict[Hashable, torch.Tensor] = {}
        self._given: set[int] = set()
        self._temporary = 0

    def add(self, step: Step) -> None:
        last = self.parts[-1] if self.parts else None
        stretch = last if isinstance(last, Stretch) else Stretch()
        length, places = len(stretch.tape), len(stretch.places)
        if self._write(stretch, step):
            self._makers |= {number: stretch for number in step.outs if number in self._sizes}
            if stretch is not last and len(stretch.tape) > length:
                self.parts.append(stretch)
            return
        stretch.tape.cut(length)
        del stretch.places[places:]
        for number in step.outs:
            self._seen.pop(number, None)
            self._sizes.pop(number, None)
        for leaf in step.leaves:
            for value in leaf if isinstance(leaf, tuple | list) else [leaf]:
                if isinstance(value, Value):
                    self.give(value.number)
        self.parts.append(step)

    def give(self, number: int) -> None:
        """Others take a value."""
        seen = self._seen.get(number)
        if seen is None or number in self._given or (seen.base == number and number not in self._sizes):
            return
        self._given.add(number)
        if seen.base in self._sizes:
            self._makers[seen.base].gives[number] = seen
        else:  # a view of what another step has made
            where = [Value(seen.base), seen.shape, seen.strides, seen.offset // 4]  # type: ignore[arg-type]
            self.parts.append(Step(torch.as_strided, where, None, [number], False, None))  # type: ignore[arg-type]

    def finish(self, results: Sequence[int], scratch: Scratch) -> Taped | None:
        """The parts, ready to run; None where nothing is gained, or where they cannot be tried."""
        if any(_does_once(part) for part in self.parts if isinstance(part, Step)):
            return None
        for number in results:
            self.give(number)
        stretches = [part for part in self.parts if isinstance(part, Stretch)]
        room, places = _Room(), {base: (_CONSTANTS, base[1]) for base in self._constants}  # type: ignore[index]
        pinned = {seen.base for stretch in stretches for seen in stretch.gives.values()}
        uses = [(stretch, record) for stretch in stretches for record in stretch.tape.operands]
        last = {operand.base: at for at, (_, record) in enumerate(uses) for operand in record}
        number = _FIRST
        for at, (stretch, record) in enumerate(uses):
            bases = {operand.base for operand in record}
            for base in bases - places.keys():
                if base in self._sizes:
                    places[base] = _SCRATCH, room.take(self._sizes[base])
                else:
                    places[base], number = (number, 0), number + 1
            for base in bases:
                if base in self._sizes:
                    if last[base] == at and base not in pinned:
                        room.give_back(places[base][1], self._sizes[base])
                elif places[base][0] >= _FIRST:
                    stretch.takes[base] = places[base][0]  # type: ignore[index]
        if room.size > MOST_BYTES or len(uses) < 2:
            return None
        return Taped(self.parts, places, room.size, number, scratch, list(self._constants.values()))

    # -- one step

    def _write(self, stretch: Stretch, step: Step) -> bool:
        args, kwargs = (step.leaves, {}) if step.spec is None else tree_unflatten(step.leaves, step.spec)
        function = step.function
        name = _name(function)
        if len(step.outs) != 1 or (kwargs and name not in _COPIES):
            return False
        number, tape = step.outs[0], stretch.tape
        if function is torch.as_strided:
            return self._cut(number, *args)
        if isinstance(function, Over):
            return self._product(tape, number, function, args[0])
        if function is _ATTEND:
            return self._attend(stretch, number, *args)
        form = self._forms.get(number)
        if form is None or form.dtype != torch.float32 or number in self._varying:
            return False
        if name in _ELEMENTWISE and len(args) <= 2:
            given = [self._operand(arg) for arg in args]
            return None not in given and tape.elementwise(_ELEMENTWISE[name], self._new(number, form), *given)  # type: ignore[arg-type]
        x = self._operand(args[0]) if isinstance(args[0], Value) else None
        if name == "cat.default":
            return self._join(tape, number, form, *args)
        if x is None:
            return False
        if name in _COPIES:
            return tape.elementwise("copy", self._new(number, form), x)
        if name == "pow.Tensor_Scalar" and args[1] == 2:
            return tape.elementwise("square", self._new(number, form), x)
        if name == "mean.dim" and len(args) > 1 and args[1] in ([-1], [len(x.shape) - 1]):
            return tape.mean(self._new(number, form), x)
        if function is columns:
            cut = Seen(x.base, x.offset + 4 * args[1], (*x.shape[:-1], args[2] - args[1]), x.strides)
            return tape.elementwise("copy", self._new(number, form), cut)
        if name == "silu" and (found := exponential()) is not None:
            return tape.silu(self._new(number, form), x, found)
        return False

    def _cut(self, number: int, of: Any, shape: Sequence[int], strides: Sequence[int], offset: int = 0) -> bool:
        whole = self._operand(of)
        if whole is None or number in self._varying or not isinstance(of, Value):
            return False
        self._seen[number] = Seen(whole.base, whole.offset + 4 * offset, tuple(shape), tuple(strides))
        return True

    def _join(self, tape: Tape, number: int, form: torch.Tensor, parts: Sequence[Any], dim: int = 0) -> bool:
        out, begin = self._new(number, form), 0
        for part in parts:
            given = self._operand(part)
            if given is None or len(given.shape) != len(out.shape):
                return False
            offset = out.offset + 4 * begin * out.strides[dim]
            if not tape.elementwise("copy", Seen(out.base, offset, given.shape, out.strides), given):
                return False
            begin += given.shape[dim]
        return True

    def _product(self, tape: Tape, number: int, over: Over, rows: Any) -> bool:
        x = self._operand(rows)
        if x is None or x.shape[-1] != over.inputs:
            return False
        if over.rounds:
            self._temporary += 1
            near = self._laid_out(("rounded", self._temporary), x.shape)
            if not tape.elementwise("round", near, x):
                return False
            x = near
        out = self._seen[number] = self._laid_out(number, (*x.shape[:-1], over.columns))
        return tape.product(out, x, over) and (not over.rounds or tape.elementwise("round", out, out))

    def _attend(
        self, stretch: Stretch, number: int, seat: TiledSeat, query: Any, key: Any, value: Any, *form: Any
    ) -> bool:
        scale, softcap, sinks = form
        sides = [self._operand(side) for side in (query, key, value)]
        code = seat.code_at_once(softcap)
        if code is None or None in sides or isinstance(sinks, Value):
            return False
        out = self._new(number, self._forms[number])
        task = stretch.tape.attend(out, sides, code, scale, sinks)  # type: ignore[arg-type]
        if task is None:
            return False
        count = out.shape[1]
        stretch.places.append(lambda: seat.place(task, count))
        return True

    # -- values

    def _operand(self, leaf: Any) -> Seen | None:
        """Where a float32 argument lies; None for others, and for those of which nobody knows."""
        if isinstance(leaf, Value):
            seen = self._seen.get(leaf.number)
            form = self._forms.get(leaf.number)
            if seen is not None or form is None or form.dtype != torch.float32 or leaf.number in self._varying:
                return seen
            seen = self._seen[leaf.number] = Seen(leaf.number, 0, tuple(form.shape), tuple(form.stride()))
            return seen
        if type(leaf) in (int, float):
            leaf = torch.tensor(leaf, dtype=torch.float32)
        if not isinstance(leaf, torch.Tensor) or leaf.dtype != torch.float32 or leaf.device.type != "cpu":
            return None
        base = "constant", leaf.data_ptr()
        self._constants[base] = leaf
        return Seen(base, 0, tuple(leaf.shape), tuple(leaf.stride()))

    def _new(self, number: int, form: torch.Tensor) -> Seen:
        """Room for a value."""
        made = self._seen[number] = self._laid_out(number, tuple(form.shape), tuple(form.stride()))
        return made

    def _laid_out(self, base: Hashable, shape: tuple[int, ...], strides: tuple[int, ...] | None = None) -> Seen:
        """In memory of its own; side by side where no strides are given."""
        strides = torch.empty(shape, device="meta").stride() if strides is None else strides
        reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        self._sizes[base] = 4 * (1 + reach)
        return Seen(base, 0, shape, tuple(strides))


class Taped:
    """Parts of a list whose tapes are ready, and the memory that they work on."""

    def __init__(
        self,
        parts: list[Step | Stretch],
        places: dict[Hashable, tuple[int, int]],
        size_bytes: int,
        num_addresses: int,
        scratch: Scratch,
        constants: list[torch.Tensor],
    ) -> None:
        self.parts = parts
        self._constants = constants  # tapes have their addresses
        self._places, self._size_bytes, self._scratch = places, size_bytes, scratch
        self._addresses = np.zeros(num_addresses, dtype=np.int64)
        self._memory: torch.Tensor | None = None
        self._views: list[tuple[list[torch.Tensor], list[Seen]]] = []

    def begin(self) -> None:
        """Before each run."""
        if self._memory is not None:
            return
        self._memory = memory = self._scratch.need(self._size_bytes, self)
        self._addresses[_SCRATCH] = memory.data_ptr()
        for views, given in self._views:
            views[:] = [self._view(seen) for seen in given]

    def let_go(self) -> None:
        """Of the memory, and of views of it."""
        self._memory = None
        for views, _ in self._views:
            views.clear()

    def own(self, result: torch.Tensor) -> torch.Tensor:
        """A result that the next run leaves alone."""
        assert self._memory is not None
        is_ours = result.untyped_storage().data_ptr() == self._addresses[_SCRATCH]
        return result.clone() if is_ours else result

    def call(self, stretch: Stretch, takes: list[tuple[int, int]], gives: list[int]) -> Callable[[list[Any]], None]:
        """takes: registers and addresses; gives: registers, in the order of the stretch's values."""
        run, addresses, places = stretch.tape.finished(self._places), self._addresses, stretch.places
        stretch.tape.cut(0)  # it has been written down
        at = addresses.ctypes.data
        views: list[torch.Tensor] = []
        self._views.append((views, list(stretch.gives.values())))

        def call(registers: list[Any]) -> None:
            for place in places:
                place()
            for register, number in takes:
                addresses[number] = registers[register].data_ptr()
            run(at)
            for register, view in zip(gives, views, strict=True):
                registers[register] = view

        return call

    def _view(self, seen: Seen) -> torch.Tensor:
        assert self._memory is not None
        begin = (self._places[seen.base][1] + seen.offset) // 4
        return torch.as_strided(self._memory, seen.shape, seen.strides, begin)


class _Room:
    """Places in memory, the first that is large enough for each."""

    def __init__(self) -> None:
        self._free: list[tuple[int, int]] = []
        self.size = 0

    def take(self, size: int) -> int:
        size = -(-size // _ALIGNED) * _ALIGNED
        for at, (begin, end) in enumerate(self._free):
            if end - begin >= size:
                self._free[at : at + 1] = [(begin + size, end)] if end - begin > size else []
                return begin
        begin, self.size = self.size, self.size + size
        return begin

    def give_back(self, begin: int, size: int) -> None:
        size = -(-size // _ALIGNED) * _ALIGNED
        spans = sorted([*self._free, (begin, begin + size)])
        self._free = spans[:1]
        for first, end in spans[1:]:
            if self._free[-1][1] == first:
                self._free[-1] = self._free[-1][0], end
            else:
                self._free.append((first, end))


_ATTEND = TiledSeat._attend.__wrapped__  # type: ignore[attr-defined]


def _does_once(step: Step) -> bool:
    return step.traits is not None and step.traits.effect and step.traits.once


def _name(function: Any) -> str:
    if isinstance(function, torch._ops.OpOverload) and function.namespace == "aten":
        return f"{function._schema.name.partition('::')[2]}.{function._overloadname}"
    module: Any = getattr(function, "__self__", None)
    return "silu" if type(module) is SiLUActivation or (type(module) is nn.SiLU and not module.inplace) else ""
