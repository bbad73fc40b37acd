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
from typing import Any

import numpy as np
import torch

from tallystick_model.anatomy import Anatomy, dissect
from tallystick_model.canonical.cache import KvCache
from tallystick_model.devices import CPU, Placement
from tallystick_model.loader import assemble
from tallystick_model.segments import Cache, Segment
from tallystick_model.skeleton import Skeleton, build_skeleton
from tallystick_model.span import SpanModel
from tallystick_protocol.manifest import Canary, Manifest
from tallystick_protocol.types import ZERO32, Digest, Span

STOCK = ZERO32
MAX_VOCAB = 8192
"""Rows of embedding and head that are computed; a product's columns do not know of each other."""

MAX_POSITIONS = 545
"""Past two calls of 256 rows, and past the 512 keys at which torch's attention starts a second block."""

MAX_POSITIONS_ALONE = 65
"""Where every row has a call of its own: each one reads all weights."""

MEMORY_ROWS = 37
"""Rows of the encoder's output that a decoder is given."""

_TAG = b"tallystick numeric class 2"
_DRAWN = 1_048_573  # a prime, so that no matrix repeats in step with its rows


def numeric_class(manifest: Manifest, devices: Sequence[torch.device] = (CPU,)) -> Digest:
    """The class of this machine for a model, as it runs now: SHA-256 over what it computes, or STOCK.

    devices: those that layers are on; where they compute different things the machine has no class, which is STOCK.
    Depends on nothing in the manifest but config, architecture, labels and numerics. Raises ManifestError when the
    config cannot be built.
    """
    first, *others = (_class_of(manifest, device) for device in devices)
    return first if all(other == first for other in others) else STOCK


def _class_of(manifest: Manifest, device: torch.device) -> Digest:
    config = _trial_config(manifest)
    skeleton = build_skeleton(config, manifest.architecture, manifest.labels)
    anatomy = dissect(skeleton)
    trial = replace(
        manifest, config=config, vocab=min(manifest.vocab, MAX_VOCAB), norms=(),
        max_length=min(manifest.max_length, MAX_POSITIONS_ALONE if anatomy.obstacles else MAX_POSITIONS),
        canary=Canary((), (), manifest.canary.output),
    )  # fmt: skip
    digest = hashlib.sha256(_TAG + manifest.numerics.encode())
    for layer in _kinds(skeleton, anatomy):
        fresh = build_skeleton(config, manifest.architecture, manifest.labels)
        span = Span(layer, layer + 1)
        placement = Placement.on(device, span)
        spliced = assemble(fresh, anatomy, span, _drawn_weights(fresh), "canonical", manifest.numerics, placement)
        outputs = _agreed_outputs(SpanModel(trial, span, spliced, "canonical"), anatomy)
        if outputs is None:
            return STOCK
        digest.update(outputs)
    return Digest(digest.digest())


def _trial_config(manifest: Manifest) -> dict[str, Any]:
    """The config with a vocabulary of at most MAX_VOCAB, and without the ids that are beyond it."""
    if manifest.vocab <= MAX_VOCAB:
        return manifest.config
    cut = {
        key: MAX_VOCAB if key.endswith("vocab_size") and value == manifest.vocab else value
        for key, value in manifest.config.items()
    }
    beyond = {
        key for key, value in cut.items() if key.endswith("_token_id") and isinstance(value, int) and value >= MAX_VOCAB
    }
    return {key: value for key, value in cut.items() if key not in beyond}


def _kinds(skeleton: Skeleton, anatomy: Anatomy) -> list[int]:
    """The first and the last layer of every stack, and one of every kind that these do not show."""
    stacks = [anatomy.stack_span(number) for number in range(len(anatomy.streams))]
    chosen = sorted({layer for stack in stacks for layer in (stack.start, stack.end - 1)})
    seen = {_kind(skeleton, anatomy, layer) for layer in chosen}
    for layer in range(len(anatomy.layers)):
        kind = _kind(skeleton, anatomy, layer)
        if kind not in seen:
            seen.add(kind)
            chosen.append(layer)
    return chosen


def _kind(skeleton: Skeleton, anatomy: Anatomy, layer: int) -> tuple[object, ...]:
    shape = anatomy.layers[layer]
    module = skeleton.stack(shape.stack)[shape.module]
    weights = tuple((name, tuple(tensor.shape)) for name, tensor in module.named_parameters())
    return (shape.stack, shape.attention, weights, tuple(type(inner).__name__ for inner in module.modules()))


def _agreed_outputs(model: SpanModel, anatomy: Anatomy) -> bytes | None:
    """What the span computes over the longest sequence; None when another way to the same rows gives other bits."""
    rows = _drawn_rows(model, anatomy, model.manifest.max_length)
    trial = _one_shot_trial if not model.causal else (_labelled_trial if _labels(model) else _causal_trial)
    outputs, agreed = trial(model, rows)
    threads = torch.get_num_threads()
    if anatomy.obstacles and threads > 1:  # operators without a rule may depend on them
        torch.set_num_threads(1)
        try:
            agreed &= torch.equal(trial(model, rows)[0], outputs)
        finally:
            torch.set_num_threads(threads)
    return outputs.numpy().astype("<f4").tobytes() if agreed and bool(torch.isfinite(outputs).all()) else None


def _labels(model: SpanModel) -> bool:
    return model.is_last and model.manifest.output_of(model.span) == "label"


def _cache(model: SpanModel, length: int) -> Cache | None:
    """A session's; of a decoder with the same memory each time."""
    decodes = 0 < model.manifest.encoder_layers <= model.span.start
    memory = _spiky(MEMORY_ROWS, model.manifest.width) if decodes else None
    return model.new_cache(length, memory)


def _steps(model: SpanModel, rows: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    """What a new session returns for the first rows, in chunks of these lengths."""
    cache = _cache(model, len(rows))
    return [model.forward([Segment(cache, at, rows[at:end])])[0] for at, end in _chunks(lengths, len(rows))]


def _causal_trial(model: SpanModel, rows: torch.Tensor) -> tuple[torch.Tensor, bool]:
    length = len(rows)
    cache, stranger = _cache(model, length), _cache(model, length)
    whole = model.forward([Segment(cache, 0, rows)])[0]
    tail = max(0, length - 11)
    assert cache is not None
    if isinstance(cache, KvCache):
        cache.crop(tail)
        again = [model.forward([Segment(cache, at, rows[at : at + 1])])[0] for at in range(tail, length)]
    else:
        again = _steps(model, rows, [tail, *[1] * (length - tail)])[-(length - tail) :]
    agreed = torch.equal(torch.cat(again), whole[tail:])
    chunked = torch.cat(_steps(model, rows, (1, 1, 1, 2, 1, 7, 3, 32, 64, 5)))
    agreed &= torch.equal(chunked, whole[: len(chunked)])
    one = _cache(model, length)
    first = min(7, length - 1)
    model.forward([Segment(one, 0, rows[:first])])
    mates = [Segment(stranger, 0, rows[tail : tail + 7]), Segment(one, first, rows[first : first + 5])]
    return whole, agreed and torch.equal(model.forward(mates)[1], whole[first : first + 5])


def _labelled_trial(model: SpanModel, rows: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The same where only a call's last row has an output."""
    rows = rows[:MAX_POSITIONS_ALONE]
    whole = torch.cat(_steps(model, rows, [1] * len(rows)))
    lengths = (3, 7, 1, 32, 5)
    ends = [end for _, end in _chunks(lengths, len(rows))]
    return whole, torch.equal(torch.cat(_steps(model, rows, lengths)), whole[[end - 1 for end in ends]])


def _one_shot_trial(model: SpanModel, rows: torch.Tensor) -> tuple[torch.Tensor, bool]:
    lengths = sorted({min(length, len(rows)) for length in (1, 4, 5, 37, len(rows))})
    alone = [model.forward([Segment(None, 0, rows[:length])])[0] for length in lengths]
    together = model.forward([Segment(None, 0, rows[:length]) for length in reversed(lengths)])
    agreed = all(torch.equal(one, other) for one, other in zip(alone, reversed(together), strict=True))
    return torch.cat(alone), agreed


def _chunks(lengths: Sequence[int], limit: int) -> list[tuple[int, int]]:
    chunks, first = [], 0
    for length in lengths:
        if first < limit and length:
            chunks.append((first, min(first + length, limit)))
            first += length
    return chunks


def _drawn_rows(model: SpanModel, anatomy: Anatomy, count: int) -> torch.Tensor:
    """Token ids, or rows that hold every stream that enters the span: spiky ones, and small ids for integers."""
    ids = (torch.arange(count) * 7919 + 13) % model.manifest.vocab
    if model.is_first:
        return ids
    stack = anatomy.layers[model.span.start].stack
    rows = torch.zeros(count, model.manifest.width)
    at = 0
    for stream in anatomy.crossing(model.span.start, stack):
        drawn = _spiky(count, stream.width) if stream.dtype.is_floating_point else (ids % 2).float()[:, None]
        rows[:, at : at + stream.width] = drawn
        at += stream.width
    return rows


def _spiky(count: int, width: int) -> torch.Tensor:
    """(count, width), of which every 16th row is 1,024 times as large, every 16th as small, and every 16th a spike."""
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
