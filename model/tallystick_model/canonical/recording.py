"""A forward written down: every operator it calls, in order, and which value goes where.

Functions marked `whole` are written down as one step, whatever they call: products, attention, experts, activations in
blocks. They decide by the number of rows what to do, or have an effect (a cache is written), and are the same function
at every number of rows. All else is ATen operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import TreeSpec, tree_flatten

_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


class Unrecordable(Exception):
    """A forward that does something that a list of steps cannot say."""


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor that a step made, or an input, by its number."""

    number: int


@dataclass(slots=True)
class Step:
    """function(*args, **kwargs), with tensors of the recording as Values among the flat leaves.

    outs: numbers of the tensors it returns; many: whether they come in a tuple or list.
    traits: of a whole function; None for an ATen operator.
    """

    function: Callable[..., Any]
    leaves: list[Any]
    spec: TreeSpec
    outs: list[int]
    many: bool
    traits: Traits | None


def taken_by(leaves: Sequence[Any]) -> list[int]:
    """The values among a step's leaves."""
    return [leaf.number for leaf in leaves if isinstance(leaf, Value)]


@dataclass(frozen=True, slots=True)
class Traits:
    """effect: whether a whole function does something beside what it returns; once: whether doing it twice is more than
    doing it once. varies: whether what it returns is of another size from call to call. direct: (its arguments) ->
    (what serves for it where they have these shapes, of how many of the arguments, from the last), or None.
    """

    effect: bool = False
    once: bool = True
    varies: bool = False
    direct: Callable[..., tuple[Callable[..., Any], int] | None] | None = None


@dataclass(frozen=True)
class Within:
    """A whole function in the scopes that it was called in."""

    function: Callable[..., Any]
    scopes: tuple[TorchDispatchMode, ...]

    def __call__(self, *args: Any) -> Any:
        with ExitStack() as held:
            for scope in self.scopes:
                held.enter_context(scope)
            return self.function(*args)


def whole(traits: Traits = Traits()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a function of tensors, and of things that do not change, that returns one tensor, as one step."""

    def marked(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def called(*args: Any) -> Any:
            recorder = _recorder.get()
            if recorder is None or recorder.paused:
                return function(*args)
            return recorder.note_whole(function, args, traits)

        return called

    return marked


class Recorder(TorchDispatchMode):
    """While held, writes down what is called in this thread; `steps` is the recording."""

    def __init__(self, inputs: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.paused = False
        self._count = 0
        self._numbers: dict[int, int] = {}
        self._depending: set[int] = set()  # numbers of what depends on the inputs
        self._alive: list[torch.Tensor] = []  # so that no other tensor takes an id
        self.inputs = [self._number(tensor) for tensor in inputs]
        self._depending.update(self.inputs)

    def __enter__(self) -> Recorder:
        self._token = _recorder.set(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _recorder.reset(self._token)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return self._note_writing(func, args, kwargs)
        out = func(*args, **kwargs)
        self._note(func, args, kwargs, out, None)
        return out

    def note_whole(self, function: Callable[..., Any], args: tuple[Any, ...], traits: Traits) -> Any:
        self.paused = True
        try:
            out = function(*args)
        finally:
            self.paused = False
        stack = _get_current_dispatch_mode_stack()
        scopes = tuple(stack[stack.index(self) + 1 :])
        if scopes and traits.direct is None:
            function = Within(function, scopes)
        self._note(function, args, {}, out, traits)
        return out

    def number_of(self, tensor: torch.Tensor) -> int:
        """Of a tensor that is an input or was made. Raises Unrecordable for another one."""
        if id(tensor) not in self._numbers:
            raise Unrecordable("a result that no recorded step has made")
        return self._numbers[id(tensor)]

    def _note(self, function: Any, args: Any, kwargs: Any, out: Any, traits: Traits | None) -> None:
        leaves, spec = tree_flatten((tuple(args), kwargs))
        marked = [
            Value(self._numbers[id(leaf)]) if isinstance(leaf, torch.Tensor) and id(leaf) in self._numbers else leaf
            for leaf in leaves
        ]
        taken = {leaf.number for leaf in marked if isinstance(leaf, Value)}
        depends = traits is not None or not taken.isdisjoint(self._depending)
        many = isinstance(out, tuple | list)
        made = list(out) if many else [out]
        if not all(isinstance(tensor, torch.Tensor) for tensor in made):
            if depends:
                raise Unrecordable(f"{function} tells Python what is in a tensor")
            return
        self._alive += [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        outs = [self._number(tensor) for tensor in made]
        if depends:
            self._depending.update(outs)
        self.steps.append(Step(function, marked, spec, outs, many, traits))

    def _note_writing(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operator that writes into its first argument, as the one that returns the result instead."""
        target, name = args[0], func._schema.name.partition("::")[2]
        writes = [bool(arg.alias_info and arg.alias_info.is_write) for arg in func._schema.arguments]
        kept = getattr(getattr(torch.ops.aten, name.rstrip("_"), None), func._overloadname, None)
        if not writes[0] or any(writes[1:]) or kept is None or id(target) not in self._numbers or self._shared(target):
            raise Unrecordable(f"{func} writes into what others may see")
        before = target.clone()
        self._numbers[id(before)] = self._numbers.pop(id(target))
        self._alive.append(before)
        out = func(*args, **kwargs)
        self._note(kept, (before, *args[1:]), kwargs, target, None)
        return out

    def _shared(self, tensor: torch.Tensor) -> bool:
        """Whether another tensor of the recording lies in the same memory."""
        at = tensor.untyped_storage().data_ptr()
        return any(other is not tensor and other.untyped_storage().data_ptr() == at for other in self._alive)

    def _number(self, tensor: torch.Tensor) -> int:
        """Of a tensor; one that comes back as it went in keeps its number."""
        self._alive.append(tensor)
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = self._count
            self._count += 1
        return self._numbers[id(tensor)]
