"""Stand-ins for what is elsewhere: parameter-free modules that keep a model's own forward going over one span."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tallystick_model.anatomy import Anatomy, module_weights
from tallystick_model.skeleton import Skeleton
from tallystick_protocol.types import Span


class Leave(Exception):
    """Carries the hidden state (1, n, width) out of the model's forward."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


class Ghost(nn.Module):
    """Answers calls in place of a module; every attribute it lacks is the original's."""

    def __init__(self, original: nn.Module, answer: Callable[..., Any]) -> None:
        super().__init__()
        # Not through nn.Module's setattr: the original's (meta) parameters must not become ours.
        self.__dict__["original"] = original
        self.__dict__["answer"] = answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["answer"](*args, **kwargs)


class Passage:
    """What goes through one forward of a spliced model: set before it, read by ghosts and hooks within.

    received: (1, n, width), what enters the span (None on the first); stop: leave after the span's last layer;
    passing: called with the index of every ghost layer that is passed.
    """

    def __init__(self) -> None:
        self.num_rows = 0
        self.received: torch.Tensor | None = None
        self.stop = True
        self.passing: Callable[[int], None] | None = None
        self.entered: torch.Tensor | None = None


def splice(skeleton: Skeleton, anatomy: Anatomy, span: Span) -> Passage:
    """Cut the span out of a skeleton, in place: ghosts for layers, prologue and unused modules that are elsewhere."""
    passage = Passage()
    if span.start > 0:
        for name in _outermost(skeleton, {name for name, role in anatomy.roles.items() if role == "embed"}):
            _replace_by_placeholder(skeleton.model, name, anatomy, passage)
    for name in _outermost(skeleton, set(anatomy.unused)):
        _replace_by_placeholder(skeleton.model, name, anatomy, passage)
    layers = skeleton.layers
    for index in range(len(layers)):
        if not span.start <= index < span.end:
            layers[index] = _ghost_layer(layers[index], index, anatomy.layers[index].arity, passage)
    return passage


def watch_ends(skeleton: Skeleton, anatomy: Anatomy, span: Span, passage: Passage) -> None:
    """Hooks on the span's first and last layer: note what enters, leave with what comes out."""
    place = anatomy.layers[span.start].hidden

    def entering(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        passage.entered = args[place] if isinstance(place, int) else kwargs[place]

    def leaving(module: Any, args: Any, output: Any) -> None:
        if passage.stop:
            raise Leave(output if isinstance(output, torch.Tensor) else output[0])

    skeleton.layers[span.start].register_forward_pre_hook(entering, with_kwargs=True)
    skeleton.layers[span.end - 1].register_forward_hook(leaving)


def _ghost_layer(original: nn.Module, index: int, arity: int, passage: Passage) -> Ghost:
    def answer(*args: Any, **kwargs: Any) -> Any:
        if passage.passing is not None:
            passage.passing(index)
        return passage.received if arity == 0 else (passage.received, *[None] * (arity - 1))

    return Ghost(original, answer)


def _replace_by_placeholder(model: Any, name: str, anatomy: Anatomy, passage: Passage) -> None:
    shape = anatomy.outputs.get(name, (1, -1, anatomy.width))

    def answer(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros([passage.num_rows if length == -1 else length for length in shape])

    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, Ghost(model.get_submodule(name), answer))


def _outermost(skeleton: Skeleton, weights: set[str]) -> list[str]:
    """The outermost modules all of whose weights, at least one, are among `weights`."""
    found: list[str] = []
    for name, module in skeleton.model.named_modules():
        own = module_weights(module, name) if name else set()
        if own and own <= weights and not any(name.startswith(outer + ".") for outer in found):
            found.append(name)
    return found
