"""Nodes that compute wrongly: each is a function that alters a loaded span, after its canary and class test passed.

Pieces, class, signatures and receipts of such a node are all in order; only its numbers are wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from tallystick_model.calibrating.cheaters import (
    answering,
    corrupt_row,
    layers,
    linears,
    noise,
    other_layer,
    pass_by,
    quantised,
    set_weight,
    skipped_layer,
)
from tallystick_model.canonical.attention import TiledSeat
from tallystick_model.segments import Segment
from tallystick_model.span import SpanModel
from tallystick_node.session import rows as rows_of_node
from tallystick_protocol.errors import ConfigError, CorruptResult, TallystickError
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.sketching.matrix import matrix
from tallystick_protocol.sketching.thresholds import logits_thresholds, thresholds

CONTEXT = 32
"""Positions that the node with a truncated context looks back on, itself included."""

UNDER = 0.8
"""Of the tolerance: sketches say an error to 15 %."""

HIDDEN_ERROR = 0.05
"""Of what the span adds."""

KNOWN_CHALLENGE = bytes(32)


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


# Rows that were never computed


def zeros(model: SpanModel) -> None:
    answering(model, lambda _, rows: torch.zeros_like(rows))


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
