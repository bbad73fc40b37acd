"""One run of a layer stack on meta tensors, and what every layer was given and gave in it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_map

from tallystick_model.skeleton import Skeleton, arguments_of
from tallystick_model.taint import Taint, tensors_in
from tallystick_protocol.errors import ManifestError

PROBE_ROWS = 13
"""Rows of the probing run; where a tensor has this length, it follows the number of rows."""

ROWS = "<rows>"
"""Mark of everything that depends on the tokens."""

MEMORY = "<memory>"
"""Mark of everything that depends on the encoder's output."""


@dataclass(slots=True)
class Call:
    """One call of a layer. module: its place in the ModuleList; output: with fresh tensors where rows are;
    reached: the tags of what it returned before."""

    module: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    reached: frozenset[str] = frozenset()

    @property
    def arguments(self) -> dict[int | str, Any]:
        named: dict[int | str, Any] = dict(enumerate(self.args))
        return named | dict(self.kwargs)

    @property
    def left(self) -> torch.Tensor:
        """The hidden state that it returned: the first tensor of its output."""
        return tensors_in(self.output)[0]


@dataclass(slots=True)
class Blank:
    """Shape and dtype of a tensor, -1 where rows count."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: torch.Tensor) -> Blank:
        return Blank(tuple(-1 if length == PROBE_ROWS else length for length in tensor.shape), tensor.dtype)


@dataclass(slots=True)
class Run:
    """calls: in order; output: the forward's; blanks: {module outside the stack: its output, tensors as `Blank`s}."""

    calls: list[Call] = field(default_factory=list)
    output: Any = None
    blanks: dict[str, Any] = field(default_factory=dict)


def ordinary_id(config: Any) -> int:
    """A token id without a meaning of its own: no padding, no start, no image."""
    config = config.get_text_config()
    special = [value for name, value in vars(config).items() if name.endswith(("_token_id", "_token_index"))]
    flat = {one for value in special if not isinstance(value, dict) for one in _as_list(value)}
    return next(token for token in range(len(flat) + 1) if token not in flat)


def _as_list(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def follow(skeleton: Skeleton, index: int, taint: Taint, encoded: Any, *, masked: bool) -> Run:
    """Run stack `index` under `taint`.

    encoded: for a decoder, what its encoder returned. masked: hand it a mask of ones.

    Raises ManifestError where layers are not called as layers, and whatever the forward raises.
    """
    run = Run()
    taint.clock = 0
    handles = _watch_outside(skeleton, skeleton.stacks[index], run, taint)
    layers = skeleton.stack(index)
    for place, layer in enumerate(layers):
        layer.forward = _recording(layer.forward, place, run, taint)
    try:
        with taint:
            run.output = skeleton.runner(index)(**_inputs(skeleton, index, taint, encoded, masked=masked))
    finally:
        for layer in layers:
            del layer.__dict__["forward"]
        for handle in handles:
            handle.remove()
    if not run.calls:
        raise ManifestError(f"{type(skeleton.model).__name__} runs no layer of {skeleton.stacks[index]}")
    return run


def _recording(forward: Callable[..., Any], module: int, run: Run, taint: Taint) -> Callable[..., Any]:
    @functools.wraps(forward)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        call = Call(module, args, kwargs)
        for tensor in tensors_in((args, kwargs)):
            if ROWS in taint.tags(tensor):
                taint.mark(tensor, {argument_tag(taint, tensor)})
        output = forward(*args, **kwargs)
        run.calls.append(call)
        taint.clock += 1
        call.reached = frozenset().union(*(taint.tags(tensor) for tensor in tensors_in(output)))
        call.output = tree_map(lambda leaf: _cut(leaf, taint), output)
        return call.output

    return recorded


def argument_tag(taint: Taint, tensor: torch.Tensor) -> str:
    """Mark of a layer's argument, by which it shows whether what the layer returns depends on it."""
    return f"<argument {taint.identity(tensor)[0]}>"


def _cut(leaf: Any, taint: Taint) -> Any:
    """A fresh tensor where one depends on the tokens: what follows depends on this layer, not on those before it."""
    if not isinstance(leaf, torch.Tensor) or ROWS not in taint.tags(leaf):
        return leaf
    fresh = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
    if not leaf.is_floating_point():
        fresh.copy_(leaf)
    taint.mark(fresh, {ROWS})
    return fresh


def _inputs(skeleton: Skeleton, index: int, taint: Taint, encoded: Any, *, masked: bool) -> dict[str, Any]:
    ids = torch.full((1, PROBE_ROWS), ordinary_id(skeleton.config))
    taint.mark(ids, {ROWS})
    positions = torch.arange(PROBE_ROWS)[None]
    mask = torch.ones(1, PROBE_ROWS, dtype=torch.long)
    inputs: dict[str, Any] = {"use_cache": False}
    if index == 0:
        inputs |= {"input_ids": ids, "position_ids": positions}
        inputs |= {"attention_mask": mask} if masked else {}
    else:
        known_rows = encoded.last_hidden_state
        memory = torch.empty(1, PROBE_ROWS + 4, known_rows.shape[-1], dtype=known_rows.dtype, device="meta")
        taint.mark(memory, {MEMORY})
        inputs |= {"decoder_input_ids": ids, "encoder_outputs": type(encoded)(last_hidden_state=memory)}
        inputs |= {"decoder_attention_mask": mask} if masked else {}
    known = arguments_of(skeleton.runner(index))
    return {name: value for name, value in inputs.items() if name in known}


def module_tag(name: str) -> str:
    """Mark of everything that depends on what a module outside the stack returned."""
    return f"<module {name}>"


def _watch_outside(skeleton: Skeleton, stack: str, run: Run, taint: Taint) -> list[Any]:
    """Hooks that note what modules outside the stack return, and mark it."""

    def note(name: str, output: Any) -> None:
        for tensor in tensors_in(output):
            taint.mark(tensor, {module_tag(name)})
        run.blanks[name] = tree_map(lambda leaf: Blank.of(leaf) if isinstance(leaf, torch.Tensor) else None, output)

    return [
        module.register_forward_hook(lambda module, args, output, name=name: note(name, output))
        for name, module in skeleton.model.named_modules()
        if name and not (name + ".").startswith(stack + ".") and not stack.startswith(name + ".")
    ]
