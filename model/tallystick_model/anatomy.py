"""What a model is made of, found by one run on meta tensors: which piece every weight belongs to, how layers are
called, how they attend, and whether canonical execution has a rule for everything in them.

Every weight carries its name as a tag; a dispatch mode hands the tags of an operator's inputs to its outputs. What
reaches the hidden state entering layer 0 is `embed`, what reaches any other input of a layer is `shared`, and what
reaches the output although the last layer's output was replaced by a fresh tensor is `head`. No names, no shapes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tallystick_model.attention import AttentionPlan, ProbeSeat, attend_with, probing
from tallystick_model.operators import BLOCKWISE, ROWWISE
from tallystick_model.skeleton import BUILD_ERRORS, Skeleton, named_weights
from tallystick_model.taint import Taint, tensors_in
from tallystick_protocol.errors import ManifestError

_PROBE_ROWS = 13
"""Rows of the probing run; where a module's output has this length, it follows the number of rows."""

LINEAR_TYPES = (nn.Linear, Conv1D)


@dataclass(frozen=True, slots=True)
class LayerShape:
    """hidden: where the hidden state is among a layer's arguments, a position or a keyword.
    arity: 0 when the layer returns the hidden state alone, else the length of the tuple that it heads.
    attention: how it attends; None when it does not go through the attention interface.
    """

    hidden: int | str
    arity: int
    attention: AttentionPlan | None


@dataclass(frozen=True, slots=True)
class Anatomy:
    """roles: {weight: "embed" | "layer.<k>" | "shared" | "head"}; unused: weights that reach nothing that is served.
    tied: {weight of the head: the weight of `embed` it shares}; aliases: {weight: the weight of its own piece}.
    outputs: {module outside the stack: shape of its output, -1 where rows count}.
    blockwise: modules with elementwise operators to be run in blocks ("" is the model itself).
    obstacles: why there is no canonical execution; empty when there is.
    """

    roles: dict[str, str]
    unused: tuple[str, ...]
    tied: dict[str, str]
    aliases: dict[str, str]
    output: Literal["logits", "hidden"]
    causal: bool
    width: int
    layers: tuple[LayerShape, ...]
    outputs: dict[str, tuple[int, ...]]
    blockwise: frozenset[str]
    obstacles: tuple[str, ...]

    def weights_of(self, piece: str) -> tuple[str, ...]:
        """The weights of a piece as it is stored, sorted: tied and aliased ones are stored elsewhere, once."""
        elsewhere = self.tied.keys() | self.aliases.keys()
        return tuple(sorted(name for name, role in self.roles.items() if role == piece and name not in elsewhere))


@dataclass(slots=True)
class _Record:
    """What the hooks of one run saw."""

    hidden: dict[int, int | str] = field(default_factory=dict)
    arity: dict[int, int] = field(default_factory=dict)
    width: int = 0
    embed: set[str] = field(default_factory=set)
    shared: set[str] = field(default_factory=set)
    left: torch.Tensor | None = None
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)


def dissect(skeleton: Skeleton) -> Anatomy:
    """Probe a skeleton. Raises ManifestError when its forward cannot be followed on meta tensors."""
    record, taint = _Record(), Taint(skeleton.weights(), skip=LINEAR_TYPES)
    seats = [ProbeSeat() for _ in skeleton.layers]
    handles = [*_watch_layers(skeleton, record, taint), *_watch_outside(skeleton, record)]
    for layer, seat in zip(skeleton.layers, seats, strict=True):
        attend_with(layer, seat)
    try:
        with torch.no_grad(), probing(skeleton.config), taint.naming(skeleton.model), taint:
            output = skeleton.model(**_probe_inputs(skeleton))
    except BUILD_ERRORS as error:
        raise ManifestError(f"{type(skeleton.model).__name__} cannot be probed: {str(error)[:160]}") from None
    finally:
        for handle in handles:
            handle.remove()
    if len(record.arity) != len(skeleton.layers):
        raise ManifestError(f"{type(skeleton.model).__name__} does not run each of its layers")
    return _conclude(skeleton, record, taint, seats, output)


def _probe_inputs(skeleton: Skeleton) -> dict[str, Any]:
    ids = torch.zeros(1, _PROBE_ROWS, dtype=torch.long)
    inputs = {"input_ids": ids, "position_ids": torch.arange(_PROBE_ROWS)[None], "use_cache": False}
    return {name: value for name, value in inputs.items() if name in skeleton.arguments}


def _watch_layers(skeleton: Skeleton, record: _Record, taint: Taint) -> list[Any]:
    """Hooks that note each layer's inputs and outputs and cut the taint after the last one."""
    handles = []
    last = len(skeleton.layers) - 1

    def entering(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named: dict[int | str, Any] = dict(enumerate(args))
        named.update(kwargs)
        place = _hidden_place(named, record.left)
        record.hidden[index] = place
        hidden = named[place]
        record.width = hidden.shape[-1]
        if index == 0:
            record.embed |= taint.tags(hidden)
        for key, value in named.items():
            if key != place:
                record.shared |= {tag for tensor in tensors_in(value) for tag in taint.tags(tensor)}

    def leaving(index: int, output: Any) -> Any:
        whole = isinstance(output, torch.Tensor)
        record.arity[index] = 0 if whole else len(output)
        record.left = output if whole else output[0]
        if index != last:
            return None
        fresh = torch.empty(record.left.shape, device="meta")  # empty_like would carry the tags along
        return fresh if whole else (fresh, *output[1:])

    for index, layer in enumerate(skeleton.layers):
        enter = lambda module, args, kwargs, index=index: entering(index, args, kwargs)  # noqa: E731
        leave = lambda module, args, output, index=index: leaving(index, output)  # noqa: E731
        handles += [
            layer.register_forward_pre_hook(enter, with_kwargs=True),
            layer.register_forward_hook(leave),
        ]
    return handles


def _hidden_place(named: dict[int | str, Any], left: torch.Tensor | None) -> int | str:
    """Where the hidden state is: the argument that the layer before returned; for the first one, by convention."""
    if left is not None:
        for place, value in named.items():
            if value is left:
                return place
    return 0 if isinstance(named.get(0), torch.Tensor) else "hidden_states"


def _watch_outside(skeleton: Skeleton, record: _Record) -> list[Any]:
    """Hooks that note the output shapes of modules outside the stack."""

    def note(name: str, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            record.outputs[name] = tuple(-1 if length == _PROBE_ROWS else length for length in output.shape)

    return [
        module.register_forward_hook(lambda module, args, output, name=name: note(name, output))
        for name, module in skeleton.model.named_modules()
        if name and not (name + ".").startswith(skeleton.stack + ".") and not skeleton.stack.startswith(name + ".")
    ]


def _conclude(skeleton: Skeleton, record: _Record, taint: Taint, seats: list[ProbeSeat], output: Any) -> Anatomy:
    served = getattr(output, "logits", None)
    kind: Literal["logits", "hidden"] = "hidden" if served is None else "logits"
    served = output.last_hidden_state if served is None else served
    roles = _roles(skeleton, record, taint.tags(served))
    tied, aliases = _sort_ties(skeleton, roles)
    plans = [seat.plan() for seat in seats]
    layers = tuple(LayerShape(record.hidden[index], record.arity[index], plan) for index, (plan, _) in enumerate(plans))
    blockwise = frozenset(module for module, name in taint.operators if name in BLOCKWISE)
    return Anatomy(
        roles,
        tuple(sorted(name for name in skeleton.weights() if name not in roles)),
        tied,
        aliases,
        kind,
        all(plan.causal for plan, _ in plans if plan) if any(plan for plan, _ in plans) else kind == "logits",
        record.width,
        layers,
        record.outputs,
        blockwise,
        tuple(_obstacles(skeleton, taint, plans)),
    )


def _roles(skeleton: Skeleton, record: _Record, head: frozenset[str]) -> dict[str, str]:
    roles = {}
    stack = skeleton.stack + "."
    for name in skeleton.weights():
        if name.startswith(stack):
            roles[name] = "layer." + name[len(stack) :].partition(".")[0]
        elif name in record.shared:
            roles[name] = "shared"
        elif name in record.embed and name in head:
            raise ManifestError(f"{name} reaches both the first layer and the output: the last span would need the ids")
        elif name in record.embed:
            roles[name] = "embed"
        elif name in head:
            roles[name] = "head"
    return roles


def _sort_ties(skeleton: Skeleton, roles: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Ties from head to embed, and ties within a piece. Raises ManifestError for any other."""
    tied: dict[str, str] = {}
    aliases: dict[str, str] = {}
    for late, early in skeleton.ties.items():
        one, other = roles.get(late), roles.get(early)
        if one is None or other is None:
            continue
        if one == other:
            aliases[late] = early
        elif {one, other} == {"embed", "head"}:
            head, embed = (late, early) if one == "head" else (early, late)
            tied[head] = embed
        else:
            raise ManifestError(f"{late} ({one}) is tied to {early} ({other}), which no piece can hold for both")
    return tied, aliases


def _obstacles(skeleton: Skeleton, taint: Taint, plans: list[tuple[AttentionPlan | None, str]]) -> list[str]:
    found = [f"layer {index}: {why}" for index, (plan, why) in enumerate(plans) if plan is None]
    if len({plan.causal for plan, _ in plans if plan}) > 1:
        found.append("some layers are causal, others not")
    if "position_ids" not in skeleton.arguments:
        found.append("its forward takes no position_ids")
    without_rule = sorted({name for _, name in taint.operators} - ROWWISE - BLOCKWISE)
    if without_rule:
        found.append(f"no rule for the operators {', '.join(without_rule[:8])}")
    return found


def module_weights(module: Any, prefix: str) -> set[str]:
    """The full names of the weights in a module at `prefix`."""
    return {f"{prefix}.{name}" for name in named_weights(module)}
