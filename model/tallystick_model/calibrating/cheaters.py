"""Nodes that compute wrongly, for measuring what shows of them: functions that alter a loaded span.

Pieces, class, signatures and receipts of such a node would all be in order; only its numbers are wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from tallystick_model.canonical.kernels import CanonicalLinear
from tallystick_model.publishing.quantize import GROUPS, MIN_VALUES, dequantise, scales_of, values_of
from tallystick_model.segments import Segment
from tallystick_model.span import SpanModel
from tallystick_protocol.manifest import Quantization

Weigh = Callable[[torch.Tensor], torch.Tensor]
Answer = Callable[[Segment, torch.Tensor], torch.Tensor]


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


def answering(model: SpanModel, answer: Answer) -> None:
    """Whatever the span has computed for a segment, it returns `answer` of it."""
    forward = model.forward

    def lie(segments: Sequence[Segment]) -> list[torch.Tensor]:
        return [answer(segment, rows) for segment, rows in zip(segments, forward(segments), strict=True)]

    model.forward = lie  # type: ignore[method-assign]


def noise(model: SpanModel) -> None:
    """Random rows, as long as the true ones."""
    generator = torch.Generator().manual_seed(0)

    def answer(_: Segment, rows: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(rows.shape, generator=generator)
        return drawn * (rows.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True))

    answering(model, answer)


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


def corrupt_row(model: SpanModel, row: int = 0, scale: float = 0.01) -> None:
    """Noise of `scale` times its own size on one row of the span's first matrix."""
    linear = next(iter(linears(layers(model)[0]).values()))
    weight = linear.plain_weight().clone()
    drawn = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0))
    weight[row] += scale * weight[row].norm() / drawn.norm() * drawn
    set_weight(linear, weight)


CHEATERS: dict[str, Callable[[SpanModel], None]] = {
    "noise": noise,
    "other_layer": other_layer,
    "skipped_layer": skipped_layer,
    "int8": partial(quantised, bits=8),
    "int4": partial(quantised, bits=4),
    "corrupt_row": corrupt_row,
}
"""By name. Layers are exchanged or left out in spans of two and more."""

MIN_LAYERS = {"other_layer": 2, "skipped_layer": 2}


def fitting(num_layers: int) -> list[str]:
    """Those that a span of so many layers can be altered by."""
    return [name for name in CHEATERS if MIN_LAYERS.get(name, 1) <= num_layers]
