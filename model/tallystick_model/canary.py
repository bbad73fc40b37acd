"""The canary: rows that every span must reproduce before it is served, whatever its class."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tallystick_model.segments import Segment
from tallystick_model.span import SpanModel
from tallystick_protocol.content.cid import Cid
from tallystick_protocol.errors import CorruptResult, ManifestError
from tallystick_protocol.manifest import Manifest, Numerics

TOLERANCE: dict[Numerics, float] = {"fp32": 1e-4, "bf16w": 2e-2}
"""Relative error that another class may show. Measured noise in fp32: below 1e-5. In bf16w a sum beside the middle of
two bf16 values goes to either: 4e-3 against the same model with sums in fp64.
"""


def check_canary(model: SpanModel, manifest: Manifest, get_block: Callable[[Cid], bytes]) -> float:
    """Run the span over the canary; returns the worst relative error |y - y'| / |y' - x| (rms over all rows).

    get_block: the bytes of a raw block, checked against its CID. Raises CorruptResult when a span computes something
    else or something that is not finite, ManifestError when the canary's own blocks are malformed.
    """
    span, ids = model.span, torch.tensor(manifest.canary.ids)

    def block(boundary: int) -> torch.Tensor:
        return read_rows(get_block(manifest.canary.rows[boundary]), len(ids), manifest.width)

    begins = manifest.takes_ids(span)
    rows = ids if begins else block(span.start)
    decodes = 0 < manifest.encoder_layers <= span.start
    memory = block(manifest.encoder_layers) if decodes else None
    before = torch.zeros(len(ids), manifest.width) if decodes and begins else block(span.start)
    expected = block(span.end)
    entered, left = model.rows_between(Segment(model.new_cache(manifest.max_length, memory), 0, rows))
    if span.end == manifest.encoder_layers:  # this boundary's block is the encoder's result, after its last norm
        left = model.forward([Segment(None, 0, rows)])[0]
    errors = [relative_error(left, expected, before)]
    if span.start == 0:
        errors.append(relative_error(entered, before, torch.zeros_like(before)))
    if span.end == manifest.layers:
        errors.append(_output_error(model, manifest, rows, memory, get_block))
    tolerance = TOLERANCE[manifest.numerics]
    if not all(error <= tolerance for error in errors):  # also when one is NaN
        raise CorruptResult(
            f"span {model.span} of {manifest.name} differs from its canary by {max(errors):.1e} ({tolerance:.0e} is "
            "allowed): its pieces are not what was published, or this machine computes wrongly; fetch them again"
        )
    return max(errors)


def read_rows(block: bytes, count: int, width: int) -> torch.Tensor:
    """A block of fp32 little-endian rows (count, width). Raises ManifestError unless it is that, and finite."""
    if len(block) != 4 * count * width:
        raise ManifestError(f"a canary block has {len(block)} bytes, not {count} rows of {width} fp32 values")
    rows = torch.frombuffer(bytearray(block), dtype=torch.float32).view(count, width)
    if not bool(torch.isfinite(rows).all()):
        raise ManifestError("a canary block holds NaN or infinity")
    return rows


def relative_error(found: torch.Tensor, expected: torch.Tensor, before: torch.Tensor) -> float:
    """rms(found - expected) / rms(expected - before): relative to what the span contributes. NaN stays NaN."""
    contribution = float((expected.double() - before.double()).square().mean().sqrt())
    error = float((found.double() - expected.double()).square().mean().sqrt())
    return error / contribution if contribution > 0 else (0.0 if error == 0 else float("nan"))


def _output_error(
    model: SpanModel,
    manifest: Manifest,
    rows: torch.Tensor,
    memory: torch.Tensor | None,
    get_block: Callable[[Cid], bytes],
) -> float:
    segment = Segment(model.new_cache(manifest.max_length, memory), 0, rows, wanted=[len(rows) - 1])
    found = model.forward([segment])[0]
    widths = {"logits": manifest.vocab, "scores": len(manifest.labels), "label": len(manifest.labels)}
    width = widths.get(manifest.output, manifest.width)
    expected = read_rows(get_block(manifest.canary.output), len(rows) if manifest.output == "hidden" else 1, width)
    return relative_error(found, expected, expected.mean(dim=1, keepdim=True) if width > 1 else expected * 0)
