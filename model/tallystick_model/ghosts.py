"""Stand-ins for what is elsewhere: modules that keep their place, without weights, and answer for a model's own forward
to go on over one span."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from tallystick_model.anatomy import Anatomy, LayerShape, module_weights
from tallystick_model.devices import CPU, Placement, moved
from tallystick_model.probe import Blank
from tallystick_model.skeleton import Skeleton, set_weight
from tallystick_model.streams import Stream
from tallystick_protocol.types import Span


class Leave(Exception):
    """Carries the streams at the span's end out of the model's forward."""

    def __init__(self, streams: list[torch.Tensor]) -> None:
        self.streams = streams


class Passage:
    """What goes through one forward of a spliced model: set before it, read by the stand-ins within.

    batch, num_rows: of the rows that travel. received: the streams that enter the span (None where ids do).
    stop: leave after the last layer of the stack; other spans leave anyway.
    entered: the streams that entered the span's first layer. placement: where the layers are.
    span: the layers that this forward computes, of those that are here. peeks: leave with what enters its first layer.
    """

    def __init__(self, placement: Placement, anatomy: Anatomy, span: Span) -> None:
        self.placement = placement
        self.span = span
        self._anatomy = anatomy
        self._crossings = self._crossings_of(span)
        self.spread = placement.distinct != (CPU,)
        self.batch = 1
        self.num_rows = 0
        self.received: list[torch.Tensor] | None = None
        self.stop = True
        self.peeks = False
        self.entered: list[torch.Tensor] = []
        self._turn = 0
        self._leaving: dict[int, torch.Tensor] = {}

    def begin(self, layer: int, span: Span) -> None:
        """Before every forward over `span`: the first layer of the stack is the next to be called."""
        self._turn = layer
        self._leaving = {}
        if span != self.span:
            self.span, self._crossings = span, self._crossings_of(span)

    @property
    def entering(self) -> list[Stream]:
        """What crosses the boundary before the span."""
        return self._crossings[0]

    @property
    def leaving(self) -> list[Stream]:
        """What crosses the boundary behind it; nothing where the stack ends there."""
        return self._crossings[1]

    def _crossings_of(self, span: Span) -> tuple[list[Stream], list[Stream]]:
        stack = self._anatomy.layers[span.start].stack
        ends = span.end == self._anatomy.stack_span(stack).end
        return self._anatomy.crossing(span.start, stack), [] if ends else self._anatomy.crossing(span.end, stack)

    def next_layer(self) -> int:
        self._turn += 1
        return self._turn - 1


def splice(skeleton: Skeleton, anatomy: Anatomy, span: Span, placement: Placement) -> Passage:
    """Cut the span out of a skeleton, in place: what is elsewhere, and what nobody asks for, answers blanks."""
    passage = Passage(placement, anatomy, span)
    stack = anatomy.layers[span.start].stack
    absent = set(anatomy.unused)
    if span.start > anatomy.stack_span(stack).start:
        absent |= {name for name in anatomy.prologues[stack] if anatomy.roles[name] == "embed"}
        _graft(skeleton, anatomy, span)
    for name in outermost(skeleton, absent):
        own = module_weights(skeleton.model.get_submodule(name), name)
        if name not in anatomy.idle and own <= set(anatomy.unused):
            continue  # it runs without its weights, and what it hands on is used
        _blank_out(skeleton.model.get_submodule(name), anatomy.blanks[stack].get(name), anatomy, passage)
    for layer in skeleton.stack(stack):
        layer.forward = _Turn(layer.forward, anatomy, passage)
    return passage


class _Turn:
    """A layer's forward: its own in the span; before and behind it the hidden state is handed on."""

    def __init__(self, forward: Callable[..., Any], anatomy: Anatomy, passage: Passage) -> None:
        self._forward, self._passage = forward, passage
        self._layers = anatomy.layers
        self._stack = anatomy.stack_span(anatomy.layers[passage.span.start].stack)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        index, span = self._passage.next_layer(), self._passage.span
        shape = self._layers[index]
        if index < span.start:
            return self._hand_on(shape, args, kwargs)
        if index >= span.end:
            self._take_leave(index, args, kwargs)
            return self._hand_on(shape, args, kwargs)
        args, kwargs = self._enter(index, args, kwargs)
        if self._passage.spread:
            device = self._passage.placement.of_layer(index)
            args, kwargs = moved(args, device), moved(kwargs, device)
        output = self._forward(*args, **kwargs)
        if index == self._stack.end - 1 and self._passage.stop:
            raise Leave([hidden_of(output, shape)])
        return output

    def _hand_on(self, shape: LayerShape, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        received = self._passage.received
        hidden = received[0] if received is not None else shape.hidden.get(args, kwargs)
        leaves, spec = tree_flatten(shape.output)
        return tree_unflatten([hidden if leaf else None for leaf in leaves], spec)

    def _enter(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer's arguments, with what was received in its place."""
        passage, first = self._passage, index == self._passage.span.start
        for number, stream in enumerate(passage.entering):
            place = stream.uses.get(index)
            if passage.received is None or place is None or (number == 0 and not first):
                continue
            args, kwargs = place.put(args, kwargs, passage.received[number])
        if first:
            own = passage.received
            passage.entered = own if own is not None else [self._layers[index].hidden.get(args, kwargs)]
            if passage.peeks:
                raise Leave(passage.entered)
        return args, kwargs

    def _take_leave(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Collect the streams that leave; go when all are there."""
        passage, found = self._passage, self._passage._leaving
        for number, stream in enumerate(passage.leaving):
            if number in found or (number == 0 and index != passage.span.end):
                continue
            before = next((at for at, other in enumerate(passage.entering) if other is stream and number), None)
            if before is not None and passage.received is not None:
                found[number] = passage.received[before]
            elif index in stream.uses:
                found[number] = stream.uses[index].get(args, kwargs)
        if len(found) == len(passage.leaving):
            raise Leave([found[number] for number in range(len(found))])


def hidden_of(output: Any, shape: LayerShape) -> torch.Tensor:
    """The hidden state among what a layer returns."""
    leaves, _ = tree_flatten(output)
    marks, _ = tree_flatten(shape.output)
    return leaves[marks.index(True)]  # type: ignore[no-any-return]


def _graft(skeleton: Skeleton, anatomy: Anatomy, span: Span) -> None:
    """Give the span's first layer the modules of the stack's first one that later layers use.

    With them go the truth values of the modules they are in, by which a layer knows that it has them.
    """
    stack = anatomy.layers[span.start].stack
    first = anatomy.stack_span(stack).start
    here, there = anatomy.layers[span.start].module, anatomy.layers[first].module
    prefix = f"{skeleton.stacks[stack]}."
    for module in sorted({module for name, module in anatomy.grafts.items() if name.startswith(prefix)}):
        inner = module.removeprefix(f"{prefix}{there}.")
        owner, _, leaf = inner.rpartition(".")
        source = skeleton.stack(stack)[there].get_submodule(owner)
        target = skeleton.stack(stack)[here].get_submodule(owner)
        setattr(target, leaf, getattr(source, leaf))
        for name, value in vars(source).items():
            if isinstance(value, bool) and name != "training":
                setattr(target, name, value)


def _blank_out(module: nn.Module, blank: Any, anatomy: Anatomy, passage: Passage) -> None:
    """Let a module return zeros of the shapes that were seen; of the hidden state's where it was not."""
    if blank is None:
        blank = Blank((1, -1, anatomy.width), torch.get_default_dtype())

    def zeros(leaf: Any) -> Any:
        if not isinstance(leaf, Blank):
            return leaf
        shape = [passage.num_rows if length == -1 else length for length in leaf.shape]
        if leaf.shape[:1] == (1,):
            shape[0] = passage.batch
        return torch.zeros(shape, dtype=leaf.dtype, device=passage.placement.first)

    module.forward = lambda *args, **kwargs: tree_map(zeros, blank)


def outermost(skeleton: Skeleton, weights: set[str]) -> list[str]:
    """The outermost modules all of whose weights, at least one, are among `weights`."""
    found: list[str] = []
    for name, module in skeleton.model.named_modules():
        own = module_weights(module, name) if name else set()
        if own and own <= weights and not any(name.startswith(outer + ".") for outer in found):
            found.append(name)
    return found


def fill_blanks(skeleton: Skeleton, anatomy: Anatomy, span: Span, device: torch.device) -> None:
    """Zeros without memory for the weights outside the layers, and for unused ones; the span's own replace them after.

    A span's forward may touch weights that it does not hold, in what it computes before its first layer.
    """
    stack = skeleton.stacks[anatomy.layers[span.start].stack] + "."
    unused = frozenset(anatomy.unused)
    for name, tensor in skeleton.weights().items():
        if (name in unused or not name.startswith(stack)) and tensor.device.type == "meta":
            set_weight(skeleton.model, name, torch.zeros((), dtype=tensor.dtype, device=device).expand(tensor.shape))
