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

_PROBE_STEPS, _THREAD_STEPS = (5, 1), (64, 17, 5, 1)
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
    whole = _steps([model], _PROBE_STEPS)
    return all(torch.equal(one, other) for one, other in zip(whole, _steps(layers, _PROBE_STEPS), strict=True))


def threads_agree(model: SpanModel) -> bool:
    """Whether a span gives the same bits with one of torch's threads as with all that there are: tried on some rows."""
    threads = torch.get_num_threads()
    many = _steps([model], _THREAD_STEPS)
    torch.set_num_threads(1)
    try:
        one = _steps([model], _THREAD_STEPS)
    finally:
        torch.set_num_threads(threads)
    return all(torch.equal(ours, theirs) for ours, theirs in zip(one, many, strict=True))


def _steps(spans: list[SpanModel], sizes: tuple[int, ...]) -> list[torch.Tensor]:
    """What leaves a chain of spans, step by step; in one step where nothing is kept in between, or it is too long."""
    model, seed = spans[0], torch.Generator().manual_seed(0)
    length = min(sum(sizes), model.manifest.max_length)
    if not model.causal or length < sum(sizes):
        sizes = (length,)
    rows = torch.randint(model.manifest.vocab, (length,), generator=seed)
    if not model.is_first:
        rows = torch.randn(length, model.manifest.width, generator=seed)
    takes_memory = 0 < model.manifest.encoder_layers <= model.span.start
    memory = torch.randn(2, model.manifest.width, generator=seed) if takes_memory else None
    caches = [span.new_cache(length, memory) for span in spans]
    left, first = [], 0
    for step in rows.split(list(sizes)):
        for span, cache in zip(spans, caches, strict=True):
            step = span.forward([Segment(cache, first, step)])[0]
        left.append(step)
        first += sizes[len(left) - 1]
    return left
