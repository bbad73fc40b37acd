"""A recording at one number of rows as a straight list of calls: the same operators on the same values, without those
whose result is known, is there already, or is needed by nobody, with every view taken in one cut, and with products
that are computed together (`joining.py`) in one call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_unflatten

from tallystick_model.canonical.kernels import MAX_ROWS, CanonicalLinear
from tallystick_model.canonical.learning import Learnt
from tallystick_model.canonical.native.tape import is_possible
from tallystick_model.canonical.recording import Step, Value, taken_by
from tallystick_model.canonical.taped import Scratch, Stretch, Taped, Writer, columns
from tallystick_model.memory import all_finite

log = logging.getLogger(__name__)

Registers = list[Any]


class Straight:
    """Calls that work on numbered registers. Not for several threads at once."""

    def __init__(
        self,
        calls: list[Callable[[Registers], None]],
        size: int,
        inputs: list[int],
        results: list[Any],
        taped: Taped | None = None,
    ) -> None:
        """inputs: the registers they are put into (-1 for nowhere); results: registers, or tensors that are known.
        taped: whose tapes are among the calls."""
        self._calls, self._blank, self._inputs, self._results = calls, [None] * size, inputs, results
        self._taped = taped

    def __len__(self) -> int:
        return len(self._calls)

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        registers: Registers = self._blank.copy()
        if self._taped is not None:
            self._taped.begin()
        for at, tensor in zip(self._inputs, inputs, strict=True):
            if at >= 0:
                registers[at] = tensor
        for call in self._calls:
            call(registers)
        found = [registers[result] if isinstance(result, int) else result for result in self._results]
        return found if self._taped is None else [self._taped.own(result) for result in found]


class Tried:
    """A list, and the same one with tapes, which is run once it has given the same bits for numbers that are finite."""

    def __init__(self, plain: Straight, taped: Straight, parts: Sequence[Step | Stretch]) -> None:
        self.parts = parts
        self.is_taped = False
        self._plain, self._taped = plain, taped
        self.run = self._try

    def _try(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        try:
            found = self._taped.run(inputs)
        except Exception:
            log.exception("small operators do not run in machine code")
            found = []
        expected = self._plain.run(inputs)  # whose keys and values stay in the caches
        if found and not all(all_finite(one) for one in expected):
            return expected  # NaNs have several forms: this call tells nothing
        self.is_taped = bool(found) and all(_same_bits(one, other) for one, other in zip(expected, found, strict=True))
        self.run = self._taped.run if self.is_taped else self._plain.run
        if not self.is_taped:
            log.warning("machine code for small operators gives other bits here, and is not used")
        return expected


def straighten(steps: Sequence[Step], learnt: Learnt, inputs: list[int], results: list[int]) -> Straight:
    """learnt: by `run_through`."""
    return _straightened(steps, learnt, inputs, results)[0]


def straighten_and_tape(
    steps: Sequence[Step], learnt: Learnt, inputs: list[int], results: list[int], scratch: Scratch
) -> Straight | Tried:
    """The same, with what a tape can compute on tapes, which work on `scratch`."""
    plain, kept, plan = _straightened(steps, learnt, inputs, results)
    if not is_possible():
        return plain
    try:
        writer = Writer(learnt.forms, learnt.varying)
        for step in kept:
            writer.add(step)
        taped = writer.finish([plan.resolve(number) for number in results], scratch)
        return plain if taped is None else Tried(plain, _bound(taped.parts, plan, inputs, results, taped), taped.parts)
    except Exception:
        log.exception("a list of calls cannot be written on tapes")
        return plain


def _straightened(
    steps: Sequence[Step], learnt: Learnt, inputs: list[int], results: list[int]
) -> tuple[Straight, list[Step], _Plan]:
    plan = _Plan(learnt, inputs)
    for step in steps:
        plan.add(step)
    kept = plan.needed(results)
    return _bound(kept, plan, inputs, results), kept, plan


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != torch.float32:
        return torch.equal(one, other)
    return one.shape == other.shape and torch.equal(one.view(torch.int32), other.view(torch.int32))


class _Plan:
    """Steps that remain. same: {value: the earlier value that it is}."""

    def __init__(self, learnt: Learnt, inputs: list[int]) -> None:
        self.learnt = learnt
        self.same: dict[int, int] = {}
        self.steps: list[Step] = []
        self._joint: dict[tuple[int, int], int] = {}  # (product, its rows' value) -> what it makes
        self._inside: dict[int, tuple[int, int]] = {}  # value -> (the one whose memory it lies in, where it begins)
        self._made = set(inputs)
        self._seen: dict[Any, list[int]] = {}

    def resolve(self, number: int) -> int:
        return self.same.get(number, number)

    def add(self, step: Step) -> None:
        if all(number in self._made for number in step.outs):
            return  # it returned what it was given
        self._made.update(step.outs)
        if all(number in self.learnt.known for number in step.outs):
            return
        leaves = [self._leaf(leaf) for leaf in step.leaves]
        effect = step.traits is not None and step.traits.effect
        key = (step.function, step.spec, *(_identity(leaf) for leaf in leaves))
        if not effect and key in self._seen:
            self.same |= dict(zip(step.outs, self._seen[key], strict=True))
            return
        self._seen[key] = step.outs
        kept = Step(step.function, leaves, step.spec, step.outs, step.many, step.traits)
        if any(number in self.learnt.varying for number in step.outs):
            self.steps.append(kept)
        elif step.traits is not None:
            self.steps.append(self._within_joint(kept) or self._directly(kept))
        elif not self._cut(step.outs):
            self.steps.append(kept)

    def _leaf(self, leaf: Any) -> Any:
        if not isinstance(leaf, Value):
            return leaf
        number = self.resolve(leaf.number)
        known = self.learnt.known.get(number)
        return Value(number) if known is None else known

    def _cut(self, outs: list[int]) -> bool:
        """Take views of what an earlier step made straight from there; False where an output is not such a view."""
        learnt = self.learnt
        for number in outs:
            owner = learnt.owners[number]
            if owner is None or owner == number or not learnt.begins_its_memory(owner):
                return False
            if learnt.forms[number].dtype != learnt.forms[owner].dtype:
                return False
        for number in outs:
            owner = self.resolve(learnt.owners[number])  # type: ignore[arg-type]
            form, held, offset = learnt.forms[number], learnt.forms[owner], learnt.offsets[number]
            if form.shape == held.shape and form.stride() == held.stride() and offset == 0:
                self.same[number] = owner
            else:
                memory, begin = self._inside.get(owner, (owner, 0))
                where = (tuple(form.shape), form.stride(), begin + offset)
                self.steps.append(_step(torch.as_strided, [Value(memory), *where], [number]))
        return True

    def _within_joint(self, step: Step) -> Step | None:
        """A product that is columns of another one: the cut, behind the other's call, which stands once for all."""
        linear, rows = step.leaves[0], step.leaves[-1]
        if not isinstance(linear, CanonicalLinear) or linear.within is None or not isinstance(rows, Value):
            return None
        joint, begin = linear.within
        form = self.learnt.forms[rows.number]
        count = form.numel() // linear.in_features
        if not form.is_contiguous() or not joint.fewest <= count <= MAX_ROWS:
            return None
        whole = self._joint.get((id(joint), rows.number))
        if whole is None:
            whole = self._joint[id(joint), rows.number] = -1 - len(self._joint)
            self.steps.append(_step(joint.direct, [rows], [whole]))
        number, end = step.outs[0], begin + linear.out_features
        if count > 1:
            return _step(columns, [Value(whole), begin, end], [number])
        self._inside[number] = (whole, begin)
        out = self.learnt.forms[number]
        return _step(torch.as_strided, [Value(whole), tuple(out.shape), out.stride(), begin], [number])

    def _directly(self, step: Step) -> Step:
        """The step, or what serves for it at these shapes."""
        if step.traits is None or step.traits.direct is None:
            return step
        given = [self.learnt.forms[leaf.number] if isinstance(leaf, Value) else leaf for leaf in step.leaves]
        found = step.traits.direct(*given)
        return step if found is None else _step(found[0], step.leaves[-found[1] :], step.outs)

    def needed(self, results: list[int]) -> list[Step]:
        """The steps that results, or effects, need."""
        wanted = {self.resolve(number) for number in results}
        kept = []
        for step in reversed(self.steps):
            if (step.traits and step.traits.effect) or any(number in wanted for number in step.outs):
                kept.append(step)
                wanted.update(taken_by(step.leaves))
        return kept[::-1]


def _step(function: Callable[..., Any], args: list[Any], outs: list[int]) -> Step:
    """A step whose arguments are plain ones."""
    return Step(function, args, None, outs, False, None)


def _identity(leaf: Any) -> Any:
    if isinstance(leaf, Value):
        return leaf
    try:
        hash(leaf)
    except TypeError:
        return id(leaf)
    return id(leaf) if isinstance(leaf, torch.Tensor) else (type(leaf), leaf)


def _bound(
    steps: Sequence[Step | Stretch], plan: _Plan, inputs: list[int], results: list[int], taped: Taped | None = None
) -> Straight:
    """Give every value a register until its last use, and every step its registers and constants."""
    last: dict[int, int] = {}
    for at, step in enumerate(steps):
        last |= dict.fromkeys(_takes(step), at)
    last |= {plan.resolve(number): len(steps) for number in results}
    where: dict[int, int] = {}
    free: list[int] = []
    size = 0

    def register(number: int) -> int:
        nonlocal size
        if free:
            where[number] = free.pop()
        else:
            where[number] = size
            size += 1
        return where[number]

    entering = [register(number) if number in last else -1 for number in inputs]
    calls = []
    for at, step in enumerate(steps):
        taken, made = set(_takes(step)), list(step.gives) if isinstance(step, Stretch) else step.outs
        if isinstance(step, Stretch):
            entries = [(where[number], address) for number, address in step.takes.items()]
        else:
            leaves = [Value(where[leaf.number]) if isinstance(leaf, Value) else leaf for leaf in step.leaves]
        free += [where[number] for number in taken if last[number] == at]
        outs = [register(number) for number in made]
        free += [where[number] for number in made if number not in last]
        if isinstance(step, Stretch):
            assert taped is not None
            calls.append(taped.call(step, entries, outs))
        else:
            calls.append(_call(step, leaves, outs))
    known = plan.learnt.known
    found = [known[number] if (number := plan.resolve(n)) in known else where[number] for n in results]
    return Straight(calls, size, entering, found, taped)


def _takes(step: Step | Stretch) -> list[int]:
    return list(step.takes) if isinstance(step, Stretch) else taken_by(step.leaves)


def _call(step: Step, leaves: list[Any], outs: list[int]) -> Callable[[Registers], None]:
    args, kwargs = (leaves, {}) if step.spec is None else tree_unflatten(leaves, step.spec)
    function = _quick(step.function)
    if kwargs and not any(isinstance(value, Value) for value in kwargs.values()):
        function, kwargs = partial(function, **kwargs), {}
    out = outs[0]
    if not kwargs and not step.many:
        takes = [at for at, arg in enumerate(args) if isinstance(arg, Value)]
        nested = any(isinstance(arg, tuple | list) and _holds_value(arg) for arg in args)
        if not nested and takes == [0]:
            return _unary(function, args[0].number, tuple(args[1:]), out)
        if not nested and takes == [0, 1] and len(args) == 2:
            return _binary(function, args[0].number, args[1].number, out)
        if not nested and takes == [1] and len(args) == 2:
            return _unary(partial(function, args[0]), args[1].number, (), out)
    makers = [_maker(arg) for arg in args]
    named = {name: _maker(value) for name, value in kwargs.items()}

    def call(registers: Registers) -> None:
        made = function(*[make(registers) for make in makers], **{key: make(registers) for key, make in named.items()})
        if step.many:
            for at, tensor in zip(outs, made, strict=True):
                registers[at] = tensor
        else:
            registers[out] = made

    return call


def _unary(function: Callable[..., Any], one: int, rest: tuple[Any, ...], out: int) -> Callable[[Registers], None]:
    def call(registers: Registers) -> None:
        registers[out] = function(registers[one], *rest)

    return call


def _binary(function: Callable[..., Any], one: int, other: int, out: int) -> Callable[[Registers], None]:
    def call(registers: Registers) -> None:
        registers[out] = function(registers[one], registers[other])

    return call


def _holds_value(arg: Any) -> bool:
    return isinstance(arg, Value) or (isinstance(arg, tuple | list) and any(_holds_value(one) for one in arg))


def _maker(arg: Any) -> Callable[[Registers], Any]:
    """What an argument is, given the registers."""
    if isinstance(arg, Value):
        number = arg.number
        return lambda registers: registers[number]
    if isinstance(arg, tuple | list) and _holds_value(arg):
        kind, makers = type(arg), [_maker(one) for one in arg]
        return lambda registers: kind(make(registers) for make in makers)
    return lambda registers: arg


def _quick(function: Any) -> Callable[..., Any]:
    """torch's own binding of an ATen operator, which is called faster than the operator's object, if there is one."""
    if not isinstance(function, torch._ops.OpOverload):
        return function  # type: ignore[no-any-return]
    name = function._schema.name.partition("::")[2]
    bound = getattr(torch, name, None) if function.namespace == "aten" else None
    return bound if callable(bound) and name in _PLAIN else function


_SAME = """
    add sub mul div neg abs rsqrt sqrt reciprocal square pow mean sum cat embedding matmul mm bmm softmax clamp where
    transpose unsqueeze select permute narrow layer_norm rms_norm cos sin tanh exp maximum minimum
"""
_PLAIN = frozenset(_SAME.split())
"""Operators whose bindings take what their objects take."""
