"""Which machines get the same bits: the class id, a digest over the outputs of a fixed computation.

The computation is built from the manifest's config: its first layer with the embedding, its last one with the head,
and one layer of every other kind, with weights and rows from exact integer arithmetic, so that they are the same on
every machine. A machine whose own chunkings disagree is not canonical: its class is "stock", ZERO32.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from tallystick_model.anatomy import Anatomy, dissect
from tallystick_model.loader import assemble
from tallystick_model.segments import Segment
from tallystick_model.skeleton import Skeleton, build_skeleton
from tallystick_model.span import SpanModel
from tallystick_protocol.manifest import Canary, Manifest
from tallystick_protocol.types import ZERO32, Digest, Span

STOCK = ZERO32
MAX_VOCAB = 8192
"""Rows of embedding and head that are computed; a product's columns do not know of each other."""

MAX_POSITIONS = 545
"""Past two calls of 256 rows, and past the 512 keys at which torch's attention starts a second block."""

_TAG = b"tallystick numeric class 1"
_DRAWN = 1_048_573  # a prime, so that no matrix repeats in step with its rows


def numeric_class(manifest: Manifest) -> Digest:
    """The class of this machine for a model, as it runs now: SHA-256 over what it computes, or STOCK.

    Depends on nothing in the manifest but config, architecture and numerics. Raises ManifestError when the config
    cannot be built.
    """
    config = {**manifest.config, "vocab_size": min(manifest.vocab, MAX_VOCAB)}
    for key, value in manifest.config.items():
        if key.endswith("_token_id") and isinstance(value, int) and value >= MAX_VOCAB:
            del config[key]
    skeleton = build_skeleton(config, manifest.architecture)
    anatomy = dissect(skeleton)
    if anatomy.obstacles:
        return STOCK
    digest = hashlib.sha256(_TAG + manifest.numerics.encode())
    trial = replace(
        manifest, config=config, vocab=config["vocab_size"], max_length=min(manifest.max_length, MAX_POSITIONS),
        norms=(), canary=Canary((), (), manifest.canary.output),
    )  # fmt: skip
    for layer in _kinds(skeleton, anatomy):
        fresh = build_skeleton(config, manifest.architecture)
        span = Span(layer, layer + 1)
        model = SpanModel(trial, span, assemble(fresh, anatomy, span, _drawn_weights(fresh), "canonical"), "canonical")
        outputs = _agreed_outputs(model)
        if outputs is None:
            return STOCK
        digest.update(outputs)
    return Digest(digest.digest())


def _kinds(skeleton: Skeleton, anatomy: Anatomy) -> list[int]:
    """The first and the last layer, and one of every kind that these two do not show."""
    last = len(anatomy.layers) - 1
    chosen = [0] if last == 0 else [0, last]
    seen = {_kind(skeleton, anatomy, layer) for layer in chosen}
    for layer in range(1, last):
        kind = _kind(skeleton, anatomy, layer)
        if kind not in seen:
            seen.add(kind)
            chosen.append(layer)
    return chosen


def _kind(skeleton: Skeleton, anatomy: Anatomy, layer: int) -> tuple[object, ...]:
    module = skeleton.layers[layer]
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in module.named_parameters())
    return (anatomy.layers[layer], shapes, tuple(type(inner).__name__ for inner in module.modules()))


def _agreed_outputs(model: SpanModel) -> bytes | None:
    """What the span computes over the longest sequence; None when another way to the same rows gives other bits."""
    trial = _causal_trial if model.manifest.causal else _one_shot_trial
    outputs, agreed = trial(model, _drawn_rows(model, model.manifest.max_length))
    return outputs.numpy().astype("<f4").tobytes() if agreed and bool(torch.isfinite(outputs).all()) else None


def _causal_trial(model: SpanModel, rows: torch.Tensor) -> tuple[torch.Tensor, bool]:
    length = len(rows)
    cache = model.new_cache(length)
    whole = model.forward([Segment(cache, 0, rows)])[0]
    tail = max(0, length - 11)
    assert cache is not None
    cache.crop(tail)
    again = [model.forward([Segment(cache, at, rows[at : at + 1])])[0] for at in range(tail, length)]
    agreed = torch.equal(torch.cat(again), whole[tail:])
    stranger = model.new_cache(length)
    for first, last in _chunks((1, 1, 1, 2, 1, 7, 3, 32, 64, 5), length):
        if first == 0:
            cache.crop(0)
        out = model.forward([Segment(cache, first, rows[first:last])])[0]
        agreed &= torch.equal(out, whole[first:last])
    cache.crop(first)
    mates = [Segment(stranger, 0, rows[tail : tail + 7]), Segment(cache, first, rows[first:last])]
    return whole, agreed and torch.equal(model.forward(mates)[1], whole[first:last])


def _one_shot_trial(model: SpanModel, rows: torch.Tensor) -> tuple[torch.Tensor, bool]:
    lengths = sorted({min(length, len(rows)) for length in (1, 4, 5, 37, len(rows))})
    alone = [model.forward([Segment(None, 0, rows[:length])])[0] for length in lengths]
    together = model.forward([Segment(None, 0, rows[:length]) for length in reversed(lengths)])
    agreed = all(torch.equal(one, other) for one, other in zip(alone, reversed(together), strict=True))
    return torch.cat(alone), agreed


def _chunks(lengths: Sequence[int], limit: int) -> list[tuple[int, int]]:
    chunks, first = [], 0
    for length in lengths:
        if first < limit:
            chunks.append((first, min(first + length, limit)))
            first += length
    return chunks


def _drawn_rows(model: SpanModel, count: int) -> torch.Tensor:
    """Token ids, or rows of which every 16th is 1,024 times as large, every 16th as small, and every 16th a spike."""
    if model.is_first:
        return (torch.arange(count) * 7919 + 13) % model.manifest.vocab
    width = model.manifest.width
    rows = _drawn(b"rows", count * width).view(count, width).clone()
    rows[3::16] *= 1024.0
    rows[7::16] /= 1024.0
    rows[11::16] = 0.0
    rows[11::16, width // 2] = 4096.0
    return rows


class _drawn_weights:
    """Weights by name: matrices of about unit gain, vectors around one."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.weights().items()}

    def __call__(self, piece: str, wanted: tuple[str, ...]) -> dict[str, torch.Tensor]:
        return {name: self._weight(name) for name in wanted}

    def _weight(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        values = _drawn(name.encode(), int(np.prod(shape))).view(shape)
        if len(shape) < 2:
            return values / 8 + 1
        return values * 2.0 ** -((max(shape).bit_length() - 2) // 2)


def _drawn(seed: bytes, count: int) -> torch.Tensor:
    """`count` multiples of 2^-15 in [-1, 1), by 32-bit integer arithmetic only."""
    index = np.arange(min(count, _DRAWN), dtype=np.uint32)
    mixed = index * np.uint32(2654435761) + np.uint32(zlib.crc32(seed))
    mixed ^= mixed >> np.uint32(15)
    mixed *= np.uint32(2246822519)
    mixed ^= mixed >> np.uint32(13)
    values = (mixed >> np.uint32(16)).astype(np.float32) / np.float32(32768) - np.float32(1)
    return torch.from_numpy(np.resize(values, count))
