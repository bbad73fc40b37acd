"""What a model is made of, found by runs on meta tensors: which piece every weight belongs to, how layers are called,
what passes between them, how they attend, and whether canonical execution has a rule for everything in them.

Every weight carries its name as a tag; a dispatch mode hands the tags of an operator's inputs to its outputs. What
reaches the tensors that enter the first layer is `embed`; what reaches a later layer from outside the stack, or any
layer by another way than with the tokens, is `shared`; what reaches the output although the last layer's output was
replaced by a fresh tensor is `head` (of an encoder: `shared`). No names, no shapes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from tallystick_model.canonical.attention import AttentionPlan, ProbeSeat, attend_with, probing
from tallystick_model.canonical.experts import PROBE
from tallystick_model.canonical.obstacles import find_obstacles
from tallystick_model.canonical.operators import SCOPED
from tallystick_model.canonical.positions import position_offset
from tallystick_model.probe import PROBE_ROWS, ROWS, Call, Run, argument_tag, follow, module_tag
from tallystick_model.skeleton import BUILD_ERRORS, Skeleton, configs_of, named_weights
from tallystick_model.streams import Place, Stream, memory_order
from tallystick_model.taint import Taint
from tallystick_protocol.errors import ManifestError
from tallystick_protocol.manifest import Output
from tallystick_protocol.types import Span

LINEAR_TYPES = (nn.Linear, Conv1D)


@dataclass(frozen=True, slots=True)
class LayerShape:
    """stack: 0, or 1 for a decoder's; module: its place in the stack's ModuleList.
    hidden: where the hidden state is among a layer's arguments; enters: in what form it comes.
    output: what it returns, as a tree in which True marks the hidden state and False everything else.
    attention: how it attends; None when it does not go through the attention interface.
    """

    stack: int
    module: int
    hidden: Place
    enters: Stream
    output: Any
    attention: AttentionPlan | None


@dataclass(frozen=True, slots=True)
class Anatomy:
    """roles: {weight: "embed" | "layer.<k>" | "shared" | "head"}; unused: weights that reach nothing that is served.
    tied: {weight of the head: the weight of `embed` it shares}; aliases: {weight: the weight of the same piece, or of
    `shared`, that is stored for it}.
    memory_width, memory_type: of an encoder's output, how wide and what class it comes in.
    prologues: for each stack the weights that reach its first layer with the tokens.
    streams: for each stack what passes between its layers, the hidden state first; ends: the hidden state that its
    last layer returns. layers: of all stacks on one axis.
    grafts: {weight of the first layer of a stack that later layers use: the module that holds it}.
    blanks: for each stack {module outside it: what it returns, tensors as `Blank`s}.
    idle: modules outside the stacks that run, but reach nothing that is served.
    replayed: whether sessions keep the rows that entered a span and compute all of them again at each step, since the
    model keeps no cache, or one of a class of its own.
    skipped: the cache entries of layers that ids alone do not call (cross-attention to images).
    masked: whether the forward needs an explicit mask; else some models make one from the ids.
    scoped: modules that call operators themselves for which there is a rule to be run by ("" is the model itself).
    exposed: weights of linear modules that other modules use, too.
    position_offset: what the model adds to positions 0.. when it makes its position ids itself; None for another rule.
    obstacles: why sessions cannot share calls in canonical execution; empty when they can.
    """

    roles: dict[str, str]
    unused: tuple[str, ...]
    tied: dict[str, str]
    aliases: dict[str, str]
    output: Output
    causal: bool
    width: int
    memory_width: int
    memory_type: Any
    layers: tuple[LayerShape, ...]
    prologues: tuple[frozenset[str], ...]
    streams: tuple[tuple[Stream, ...], ...]
    ends: tuple[Stream, ...]
    grafts: dict[str, str]
    blanks: tuple[dict[str, Any], ...]
    idle: frozenset[str]
    replayed: bool
    skipped: frozenset[int]
    masked: bool
    scoped: frozenset[str]
    exposed: frozenset[str]
    position_offset: int | None
    obstacles: tuple[str, ...]

    @property
    def encoder_layers(self) -> int:
        return sum(layer.stack == 0 for layer in self.layers) if len(self.streams) > 1 else 0

    def stack_span(self, stack: int) -> Span:
        """The layers of a stack."""
        cut = self.encoder_layers
        return Span(0, cut) if stack == 0 and cut else Span(cut, len(self.layers))

    def crossing(self, boundary: int, stack: int) -> list[Stream]:
        """The streams that a row at a boundary holds; behind the last layer the hidden state alone."""
        if boundary == self.stack_span(stack).end:
            return [self.ends[stack]]
        others = [stream for stream in self.streams[stack][1:] if stream.crosses(boundary)]
        return [self.layers[boundary].enters, *others]

    def weights_of(self, piece: str) -> tuple[str, ...]:
        """The weights of a piece as it is stored, sorted: tied and aliased ones are stored elsewhere, once."""
        elsewhere = self.tied.keys() | self.aliases.keys()
        return tuple(sorted(name for name, role in self.roles.items() if role == piece and name not in elsewhere))


@dataclass(slots=True)
class _Found:
    """What is learnt of one stack. first: the layer of the whole axis that its first one is."""

    first: int
    layers: list[LayerShape] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)
    end: Stream | None = None
    embed: set[str] = field(default_factory=set)
    shared: set[str] = field(default_factory=set)


def dissect(skeleton: Skeleton) -> Anatomy:
    """Probe a skeleton. Raises ManifestError when its forward cannot be followed on meta tensors."""
    before = [(module, _tables(module), dict(module._buffers)) for module in skeleton.model.modules()]
    try:
        return _dissect(skeleton, masked=False)
    except ManifestError:
        return _dissect(skeleton, masked=True)
    finally:  # some forwards put tables where their inputs are, which is nowhere
        for module, tables, buffers in before:
            module.__dict__.update(tables)
            module._buffers.update(buffers)


def _tables(module: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors that a module holds as plain attributes."""
    return {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}


def _dissect(skeleton: Skeleton, *, masked: bool) -> Anatomy:
    taint = Taint(skeleton.weights(), skip=LINEAR_TYPES)
    seats = [ProbeSeat() for _ in skeleton.layers]
    attend_with(skeleton.model, ProbeSeat())
    for layer, seat in zip(skeleton.layers, seats, strict=True):
        attend_with(layer, seat)
    runs: list[Run] = []
    experts = {id(config): (config, config._experts_implementation) for config in configs_of(skeleton.model)}
    try:
        for config, _ in experts.values():
            config._experts_implementation = PROBE
        with torch.no_grad(), probing(skeleton.config), taint.naming(skeleton.model):
            for index in range(len(skeleton.stacks)):
                runs.append(follow(skeleton, index, taint, runs[0].output if index else None, masked=masked))
    except BUILD_ERRORS as error:
        raise ManifestError(f"{type(skeleton.model).__name__} cannot be probed: {str(error)[:160]}") from None
    finally:
        for config, before in experts.values():
            config._experts_implementation = before
    return _conclude(skeleton, runs, taint, seats, masked=masked)


def _conclude(skeleton: Skeleton, runs: list[Run], taint: Taint, seats: list[ProbeSeat], *, masked: bool) -> Anatomy:
    kind, served = _served(skeleton, runs[-1].output)
    plans = [seat.plan() for seat in seats]
    found: list[_Found] = []
    first = 0
    for index, run in enumerate(runs):
        found.append(_read(skeleton, index, run, first, taint, plans))
        first += len(run.calls)
    if len(runs) > 1:
        found[0].shared |= _names(taint.tags(runs[0].output.last_hidden_state))
    roles = _roles(skeleton, found, _names(frozenset().union(*(taint.tags(tensor) for tensor in served))))
    tied, aliases = _sort_ties(skeleton, roles)
    layers = tuple(layer for one in found for layer in one.layers)
    memory_width = int(runs[0].output.last_hidden_state.shape[-1]) if len(runs) > 1 else 0
    ends = tuple(one.end for one in found if one.end is not None)
    widths = [
        sum(stream.width for stream in one.streams if stream.crosses(boundary))
        for one in found
        for boundary in range(one.first, one.first + len(one.layers))
    ]
    last = [call.arguments for call in runs[-1].calls]
    exposed, offset = _exposed(skeleton, taint), position_offset(skeleton)
    called = _called(skeleton, runs)
    ran = [plan for plan, layer in zip(plans, skeleton.layers, strict=True) if id(layer) in called]
    obstacles = find_obstacles(skeleton, taint, ran, [one.streams for one in found], [len(r.calls) for r in runs])
    if exposed:
        obstacles.append(f"{min(exposed)} is used by another module, too")
    if offset is None and "position_ids" in skeleton.arguments:
        obstacles.append("it numbers positions by a rule of its own")
    return Anatomy(
        roles,
        tuple(sorted(name for name in skeleton.weights() if name not in roles)),
        tied,
        aliases,
        kind,
        _is_causal(skeleton, ran, kind, last),
        max(*widths, *(end.width for end in ends), memory_width),
        memory_width,
        type(runs[0].output),
        layers,
        tuple(frozenset(one.embed) for one in found),
        tuple(tuple(one.streams) for one in found),
        ends,
        _grafts(skeleton, roles, layers),
        tuple(run.blanks for run in runs),
        _idle(runs, served, taint),
        _is_replayed(skeleton),
        _skipped(skeleton, called),
        masked,
        frozenset(module for module, name in taint.operators if name in SCOPED),
        exposed,
        offset,
        tuple(obstacles),
    )


def _called(skeleton: Skeleton, runs: list[Run]) -> set[int]:
    """The layers that were run, by id."""
    return {id(skeleton.stack(index)[call.module]) for index, run in enumerate(runs) for call in run.calls}


def _idle(runs: list[Run], served: list[torch.Tensor], taint: Taint) -> frozenset[str]:
    """Modules outside the stacks that ran, and whose output is neither served nor given to a layer."""
    reached = {tag for tensor in served for tag in taint.tags(tensor)}
    reached |= {tag for run in runs for call in run.calls for _, leaf in _leaves(call) for tag in taint.tags(leaf)}
    if len(runs) > 1:
        reached |= taint.tags(runs[0].output.last_hidden_state)
    return frozenset(name for run in runs for name in run.blanks if module_tag(name) not in reached)


def _is_replayed(skeleton: Skeleton) -> bool:
    """Whether transformers has no cache of the usual class for it."""
    usual = getattr(skeleton.model, "_supports_default_dynamic_cache", lambda: True)
    return not usual() or not {"past_key_values", "cache_params"} & skeleton.arguments


def _skipped(skeleton: Skeleton, called: set[int]) -> frozenset[int]:
    idle = [layer for layer in skeleton.layers if id(layer) not in called]
    indices = {getattr(inner, "layer_idx", None) for layer in idle for inner in layer.modules()}
    return frozenset(index for index in indices if isinstance(index, int))


def _exposed(skeleton: Skeleton, taint: Taint) -> frozenset[str]:
    """Weights of linear modules that operators outside these modules took."""
    linear = {name for name, module in skeleton.model.named_modules() if isinstance(module, LINEAR_TYPES)}
    return frozenset(name for name in taint.exposed if name.rpartition(".")[0] in linear)


def _served(skeleton: Skeleton, output: Any) -> tuple[Output, list[torch.Tensor]]:
    """What kind of output the model has, and the tensors of it."""
    if getattr(output, "start_logits", None) is not None:
        return "scores", [output.start_logits, output.end_logits]
    logits = getattr(output, "logits", None)
    if logits is None and getattr(output, "prediction_logits", None) is not None:
        raise ManifestError(f"{type(skeleton.model).__name__} has several heads: publish one with a single task")
    if logits is None:
        return "hidden", [output.last_hidden_state]
    if type(skeleton.model).__name__ in _classes(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES):
        return "label", [logits]
    if type(skeleton.model).__name__.endswith("ForTokenClassification"):
        return "scores", [logits]
    return "logits", [logits]


def _classes(mapping: Any) -> set[str]:
    return {name for names in mapping.values() for name in ((names,) if isinstance(names, str) else names)}


def _is_causal(skeleton: Skeleton, plans: list[Any], kind: Output, last: list[dict[int | str, Any]]) -> bool:
    """Read off the masks; where attention does not go through the interface, by what the class is for."""
    masks = [plan for plan, _ in plans[-len(last) :] if plan]
    if len(skeleton.stacks) > 1:
        return True
    if masks:
        return all(plan.causal for plan in masks)
    return type(skeleton.model).__name__ in _classes(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) and bool(
        getattr(skeleton.config, "is_decoder", True) or kind == "logits"
    )


def _read(skeleton: Skeleton, index: int, run: Run, first: int, taint: Taint, plans: list[Any]) -> _Found:
    """The layers and streams of one stack."""
    found = _Found(first)
    calls = run.calls
    modules = sum(len(skeleton.stack(earlier)) for earlier in range(index))
    places = _hidden_places(calls, taint)
    hidden = places[0].get(calls[0].args, calls[0].kwargs)
    uses = {first + k: place for k, place in enumerate(places)}
    found.streams.append(_stream(hidden, 0, uses, "the hidden state"))
    found.embed |= _names(taint.tags(hidden))
    sides: dict[tuple[Any, ...], tuple[torch.Tensor, dict[int, Place]]] = {}
    for k, call in enumerate(calls):
        for place, leaf in _leaves(call):
            tags = taint.tags(leaf)
            if place == places[k]:
                found.shared |= _names(tags) if k else set()
            elif ROWS not in tags:
                found.shared |= _names(tags)
            elif argument_tag(taint, leaf) in call.reached:
                sides.setdefault(taint.identity(leaf), (leaf, {}))[1][first + k] = place
                (found.embed if taint.born(leaf) == 0 else found.shared).update(_names(tags))
        enters = _stream(places[k].get(call.args, call.kwargs), 0, uses, "the hidden state")
        shape = _marked(call.output)
        plan = plans[modules + call.module][0]
        found.layers.append(LayerShape(index, call.module, places[k], enters, shape, plan))
    for leaf, used in sides.values():
        born = taint.born(leaf)
        found.streams.append(_stream(leaf, first + born if born else 0, used, f"what layer {min(used)} takes"))
    found.end = _stream(calls[-1].left, first + len(calls), {}, "the hidden state")
    return found


def _leaves(call: Call) -> list[tuple[Place, torch.Tensor]]:
    return [
        (Place(name, index), leaf)
        for name, given in call.arguments.items()
        for index, leaf in enumerate(tree_flatten(given)[0])
        if isinstance(leaf, torch.Tensor)
    ]


def _hidden_places(calls: list[Call], taint: Taint) -> list[Place]:
    """Where each call takes the hidden state: what the layer before returned; else where most others take it."""
    places: list[Place | None] = [None]
    for before, call in pairwise(calls):
        left = before.left
        places.append(next((place for place, leaf in _leaves(call) if leaf is left), None))
    known = next((place for place in places if place is not None), None)
    for k, call in enumerate(calls):
        candidates = [place for place, leaf in _leaves(call) if ROWS in taint.tags(leaf) and leaf.is_floating_point()]
        if places[k] is None:
            if not candidates:
                raise ManifestError("a layer takes nothing that depends on the tokens")
            places[k] = known if known in candidates else candidates[0]
    return [place for place in places if place is not None]


def _stream(tensor: torch.Tensor, born: int, uses: dict[int, Place], what: str) -> Stream:
    shape = tuple(-1 if length == PROBE_ROWS else length for length in tensor.shape)
    if shape.count(-1) != 1:
        raise ManifestError(f"{what} depends on the tokens and is {shape}, not one row for each of them")
    return Stream(shape, memory_order(tensor), tensor.dtype, born, uses)


def _marked(output: Any) -> Any:
    leaves, spec = tree_flatten(output)
    at = next(index for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))
    return tree_unflatten([index == at for index in range(len(leaves))], spec)


def _names(tags: frozenset[str]) -> set[str]:
    return {tag for tag in tags if not tag.startswith("<")}


def _roles(skeleton: Skeleton, found: list[_Found], head: set[str]) -> dict[str, str]:
    roles = {}
    shared: set[str] = set().union(*(one.shared for one in found))
    embed: set[str] = set().union(*(one.embed for one in found))
    modules: dict[str, list[int]] = {}
    for index, one in enumerate(found):
        for number, layer in enumerate(one.layers):
            modules.setdefault(f"{skeleton.stacks[index]}.{layer.module}.", []).append(one.first + number)
    for name in skeleton.weights():
        prefix = next((prefix for prefix in modules if name.startswith(prefix)), None)
        if prefix is not None:
            alone = len(modules[prefix]) == 1 and name not in shared
            roles[name] = f"layer.{modules[prefix][0]}" if alone else "shared"
        elif name in shared or (name in embed and name in head):
            roles[name] = "shared"
        elif name in embed:
            roles[name] = "embed"
        elif name in head:
            roles[name] = "head"
    return roles


def _sort_ties(skeleton: Skeleton, roles: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Ties from head to embed, and from any weight to one that every span of it has. May move weights to `shared`."""
    groups: dict[str, list[str]] = {}
    for late in skeleton.ties:
        early = late
        while early in skeleton.ties:
            early = skeleton.ties[early]
        groups.setdefault(early, [early]).append(late)
    tied: dict[str, str] = {}
    aliases: dict[str, str] = {}
    for group in groups.values():
        names = [name for name in group if name in roles]
        kinds = {roles[name] for name in names}
        if kinds == {"embed", "head"}:
            front = [name for name in names if roles[name] == "embed"]
            tied |= {name: front[0] for name in names if roles[name] == "head"}
            names = front
        elif len(kinds) > 1:
            roles |= dict.fromkeys(names, "shared")
        aliases |= dict.fromkeys(names[1:], names[0]) if names else {}
    return tied, aliases


def _grafts(skeleton: Skeleton, roles: dict[str, str], layers: tuple[LayerShape, ...]) -> dict[str, str]:
    """Modules of a stack's first layer whose weights later layers use without the tokens."""
    grafts: dict[str, str] = {}
    for index, stack in enumerate(skeleton.stacks):
        first = next(layer for layer in layers if layer.stack == index)
        once = sum(layer.stack == index and layer.module == first.module for layer in layers) == 1
        prefix = f"{stack}.{first.module}."
        if once:
            shared = [name for name, role in roles.items() if role == "shared" and name.startswith(prefix)]
            grafts |= {name: name.rpartition(".")[0] for name in shared}
    return grafts


def module_weights(module: Any, prefix: str) -> set[str]:
    """The full names of the weights in a module at `prefix`."""
    return {f"{prefix}.{name}" for name in named_weights(module)}
