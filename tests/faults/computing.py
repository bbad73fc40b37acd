"""Nodes that compute wrongly: each is a function that alters a loaded span, after its canary and class test passed.

Pieces, class, signatures and receipts of such a node are all in order; only its numbers are wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from tallystick_model.canonical.attention import TiledSeat
from tallystick_model.canonical.kernels import CanonicalLinear
from tallystick_model.publishing.quantize import GROUPS, MIN_VALUES, dequantise, scales_of, values_of
from tallystick_model.segments import Segment
from tallystick_model.span import SpanModel
from tallystick_node.session import rows as rows_of_node
from tallystick_protocol.errors import ConfigError, CorruptResult, TallystickError
from tallystick_protocol.manifest import Manifest, Quantization
from tallystick_protocol.sketching.matrix import matrix
from tallystick_protocol.sketching.thresholds import logits_thresholds, thresholds

CONTEXT = 32
"""Positions that the node with a truncated context looks back on, itself included."""

UNDER = 0.8
"""Of the tolerance: sketches say an error to 15 %."""

HIDDEN_ERROR = 0.05
"""Of what the span adds."""

KNOWN_CHALLENGE = bytes(32)

Weigh = Callable[[torch.Tensor], torch.Tensor]
Answer = Callable[[Segment, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Computing:
    """what: in a few words. alter(span): from now on it computes wrongly. min_layers: that a span must have for it.

    at_end: whether it can be done where results leave the model.
    """

    what: str
    alter: Callable[[SpanModel], None]
    min_layers: int = 1
    at_end: bool = True

    def fits(self, model: SpanModel) -> bool:
        return self.min_layers <= len(model.span) and (self.at_end or not model.is_last)

    def __call__(self, model: SpanModel) -> None:
        """Raises ConfigError for a span that it does not fit."""
        if not self.fits(model):
            raise ConfigError(f"{self.what}: not in layers {model.span}")
        self.alter(model)


# What a span is made of


def layers(model: SpanModel) -> list[torch.nn.Module]:
    """The modules of the span's layers."""
    spliced, span = model._spliced, model.span
    shapes = [spliced.anatomy.layers[index] for index in range(span.start, span.end)]
    return [spliced.skeleton.stack(shape.stack)[shape.module] for shape in shapes]


def linears(layer: torch.nn.Module) -> dict[str, CanonicalLinear]:
    return {name: module for name, module in layer.named_modules() if isinstance(module, CanonicalLinear)}


def set_weight(linear: CanonicalLinear, weight: torch.Tensor) -> None:
    """weight: (out, in) fp32. The bias stays."""
    linear.weight = CanonicalLinear(weight, None, numerics="bf16w" if linear.rounds else "fp32").weight


# Rows that were never computed


def answering(model: SpanModel, answer: Answer) -> None:
    """Whatever the span has computed for a segment, it returns `answer` of it."""
    forward = model.forward

    def lie(segments: Sequence[Segment]) -> list[torch.Tensor]:
        return [answer(segment, rows) for segment, rows in zip(segments, forward(segments), strict=True)]

    model.forward = lie  # type: ignore[method-assign]


def zeros(model: SpanModel) -> None:
    answering(model, lambda _, rows: torch.zeros_like(rows))


def noise(model: SpanModel) -> None:
    """Random rows, as long as the true ones."""
    generator = torch.Generator().manual_seed(0)

    def answer(_: Segment, rows: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(rows.shape, generator=generator)
        return drawn * (rows.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True))

    answering(model, answer)


def stale(model: SpanModel) -> None:
    """From a session's second step on, what its step before ended with."""
    last: dict[int, torch.Tensor] = {}

    def answer(segment: Segment, rows: torch.Tensor) -> torch.Tensor:
        before = last.get(id(segment.cache)) if segment.first else None
        if len(rows):
            last[id(segment.cache)] = rows[-1:].clone()
        return rows if before is None else before.expand_as(rows).clone()

    answering(model, answer)


@contextmanager
def answers_unchecked() -> Iterator[None]:
    """While held, nodes of this process sign rows that an honest node would not: of a norm that no row has."""
    check = rows_of_node.check_rows

    def check_what_comes_in(rows: Any, manifest: Manifest, boundary: int, error: type[TallystickError]) -> None:
        if error is not CorruptResult:
            check(rows, manifest, boundary, error)  # type: ignore[arg-type]

    vars(rows_of_node)["check_rows"] = check_what_comes_in
    try:
        yield
    finally:
        vars(rows_of_node)["check_rows"] = check


# Less than the whole model


def pass_by(model: SpanModel, layer: torch.nn.Module) -> None:
    """A layer hands on what it gets."""
    turn, spliced = layer.forward, model._spliced
    here = (spliced.skeleton.stack(shape.stack)[shape.module] is layer for shape in spliced.anatomy.layers)
    shape = next(itertools.compress(spliced.anatomy.layers, here))

    def forward(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten(shape.output)
        hidden = shape.hidden.get(args, kwargs)
        return tree_unflatten([hidden if leaf else None for leaf in leaves], spec)

    turn._forward = forward  # type: ignore[attr-defined]


def skipped_layer(model: SpanModel) -> None:
    """All layers of the span but its first one."""
    pass_by(model, layers(model)[0])


def early_exit(model: SpanModel) -> None:
    """The first half of the span's layers; the head, if it has one, on what leaves them."""
    for layer in layers(model)[-(len(model.span) // 2) :]:
        pass_by(model, layer)


def truncated_context(model: SpanModel) -> None:
    """No position sees more than the last CONTEXT ones."""
    for seat in {next(layer.children()).tallystick_seat for layer in layers(model)}:
        assert isinstance(seat, TiledSeat)
        seat._plan = replace(seat._plan, mask=replace(seat._plan.mask, window=CONTEXT))


# Other weights than the manifest's


def reweighed(model: SpanModel, weigh: Weigh) -> None:
    for layer in layers(model):
        for linear in linears(layer).values():
            set_weight(linear, weigh(linear.plain_weight()))


def other_layer(model: SpanModel) -> None:
    """The span's first and last layer have each other's matrices."""
    first, *_, last = layers(model)
    there = linears(last)
    for name, linear in linears(first).items():
        mine, theirs = linear.plain_weight(), there[name].plain_weight()
        set_weight(linear, theirs)
        set_weight(there[name], mine)


def quantised(model: SpanModel, bits: int) -> None:
    """All matrices of the layers that publishing would quantise, as it does."""
    how = Quantization(bits, GROUPS[bits])  # type: ignore[arg-type]

    def weigh(weight: torch.Tensor) -> torch.Tensor:
        if weight.numel() < MIN_VALUES or weight.shape[1] % 2:
            return weight
        return dequantise("", values_of(weight, how), scales_of(weight, how), how)

    reweighed(model, weigh)


def smaller_model(model: SpanModel) -> None:
    """Half as many neurons, half as long values: what ends a layer's parts reads the heavier half of its inputs."""

    def weigh(weight: torch.Tensor) -> torch.Tensor:
        kept = weight.norm(dim=0).argsort(descending=True)[: weight.shape[1] // 2]
        pruned = torch.zeros_like(weight)
        pruned[:, kept] = weight[:, kept]
        return pruned

    for layer in layers(model):
        for linear in linears(layer).values():
            if linear.out_features == model.manifest.width:
                set_weight(linear, weigh(linear.plain_weight()))


def corrupt_row(model: SpanModel, row: int = 0, scale: float = 0.01) -> None:
    """Noise of `scale` times its own size on one row of the span's first matrix."""
    linear = next(iter(linears(layers(model)[0]).values()))
    weight = linear.plain_weight().clone()
    drawn = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0))
    weight[row] += scale * weight[row].norm() / drawn.norm() * drawn
    set_weight(linear, weight)


# Errors that are made for the tolerances between classes


def added(model: SpanModel, segment: Segment, rows: torch.Tensor) -> torch.Tensor:
    """|y - x| of each row that leaves, (n, 1)."""
    entered = segment.rows
    if model.is_first:
        entered = model._spliced.skeleton.model.get_input_embeddings()(entered)
    return (rows - entered).norm(dim=-1, keepdim=True)


def under_tolerance(model: SpanModel) -> None:
    """An error in a random direction, just under what another class tolerates."""
    generator, rows_limit = torch.Generator().manual_seed(0), thresholds(model.manifest, model.span).clear
    results_limit = min(logits_thresholds(model.manifest).row, logits_thresholds(model.manifest).window)

    def answer(segment: Segment, rows: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(rows.shape, generator=generator)
        if not len(rows):
            return rows
        if model.is_last:
            return rows + UNDER * results_limit * rows.std(dim=-1, keepdim=True, correction=0) * drawn
        return rows + UNDER * rows_limit * added(model, segment, rows) * drawn / drawn.norm(dim=-1, keepdim=True)

    answering(model, answer)


def null_space(model: SpanModel) -> None:
    """A large error that the sketch matrix of one known challenge does not show."""
    generator = torch.Generator().manual_seed(0)
    s = torch.from_numpy(matrix(KNOWN_CHALLENGE, model.manifest.width))
    hidden = torch.eye(model.manifest.width, dtype=torch.float64) - torch.linalg.pinv(s) @ s

    def answer(segment: Segment, rows: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(rows.shape, generator=generator, dtype=torch.float64) @ hidden
        error = HIDDEN_ERROR * added(model, segment, rows) * drawn / drawn.norm(dim=-1, keepdim=True)
        return rows + error.float()

    answering(model, answer)


COMPUTING: dict[str, Computing] = {
    "zeros": Computing("zeros", zeros),
    "noise": Computing("random rows of the right size", noise),
    "stale": Computing("the answer to the step before", stale),
    "other_layer": Computing("another layer's weights", other_layer, 2),
    "skipped_layer": Computing("a layer left out", skipped_layer, 2),
    "early_exit": Computing("the first half of the layers", early_exit, 2),
    "int8": Computing("int8 weights under the full-precision id", partial(quantised, bits=8)),
    "int4": Computing("int4 weights under the full-precision id", partial(quantised, bits=4)),
    "smaller_model": Computing("half the neurons and values", smaller_model),
    "corrupt_row": Computing("1 % of noise on one row of one matrix", corrupt_row),
    "truncated_context": Computing(f"{CONTEXT} positions of context", truncated_context),
    "under_tolerance": Computing("an error just under the tolerance on every hop", under_tolerance),
    "null_space": Computing("an error in the null space of a known sketch matrix", null_space, at_end=False),
}


def matching(model: SpanModel) -> Iterator[str]:
    """The names of what can be done to a span."""
    return (name for name, cheat in COMPUTING.items() if cheat.fits(model))
