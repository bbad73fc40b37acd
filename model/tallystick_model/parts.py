"""Sessions over some of a span's layers: the same weights, entered late or left early.

A part computes the bits that a span of exactly these layers would: outside of its layers a spliced model does nothing
to the rows but carry them.
"""

from __future__ import annotations

import torch

from tallystick_model.segments import Segment
from tallystick_model.span import SpanModel
from tallystick_protocol.errors import WrongLayers
from tallystick_protocol.types import Span

_PROBE_STEPS = (5, 1)
"""Rows of the steps that are compared."""


def serves_parts(model: SpanModel) -> bool:
    """Whether a span may be served in parts: where canonical calls are shared, or nothing is kept at all.

    Not where later layers use what the first one of the stack holds (a table of relative positions), nor where the
    model's own cache or a state counts its layers; nor for a single layer.
    """
    if model.execution != "canonical" or len(model.span) == 1:
        return False
    return (model.packs or not model.causal) and not model._spliced.anatomy.grafts


def part_of(model: SpanModel, span: Span) -> SpanModel:
    """A span of some of a model's layers, which shares its weights; the model itself for all of them.

    Not for use beside it on another thread. Raises WrongLayers for layers that it has not, or not apart.
    """
    if span == model.span:
        return model
    inside = model.span.start <= span.start and span.end <= model.span.end
    if not inside or not serves_parts(model):
        raise wrong_layers(model, span)
    return SpanModel(model.manifest, span, model._spliced, model.execution)


def wrong_layers(model: SpanModel, span: Span) -> WrongLayers:
    """What a client is told that asks for other layers than it can have."""
    whole = model.span
    inside = whole.start <= span.start and span.end <= whole.end
    what = f"this node serves layers {whole}" + (", as a whole" if inside else "")
    return WrongLayers(what, start=whole.start, end=whole.end)


def parts_agree(model: SpanModel) -> bool:
    """Whether a span's layers, one after the other as parts, give the bits of the whole span: tried on a few rows."""
    if not serves_parts(model):
        return False
    layers = [part_of(model, Span(layer, layer + 1)) for layer in range(model.span.start, model.span.end)]
    seed = torch.Generator().manual_seed(0)
    length = min(sum(_PROBE_STEPS), model.manifest.max_length)
    rows = torch.randint(model.manifest.vocab, (length,), generator=seed)
    if not model.is_first:
        rows = torch.randn(length, model.manifest.width, generator=seed)
    takes_memory = 0 < model.manifest.encoder_layers <= model.span.start
    memory = torch.randn(2, model.manifest.width, generator=seed) if takes_memory else None
    whole = _steps([model], rows, memory)
    return all(torch.equal(one, other) for one, other in zip(whole, _steps(layers, rows, memory), strict=True))


def _steps(spans: list[SpanModel], rows: torch.Tensor, memory: torch.Tensor | None) -> list[torch.Tensor]:
    """What leaves a chain of spans, step by step; in one step where nothing is kept in between."""
    caches = [span.new_cache(len(rows), memory) for span in spans]
    sizes = _PROBE_STEPS if spans[0].causal and len(rows) == sum(_PROBE_STEPS) else (len(rows),)
    left, first = [], 0
    for step in rows.split(list(sizes)):
        for span, cache in zip(spans, caches, strict=True):
            step = span.forward([Segment(cache, first, step)])[0]
        left.append(step)
        first += sizes[len(left) - 1]
    return left
