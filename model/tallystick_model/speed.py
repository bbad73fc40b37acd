"""How long a row takes in one layer of a model on this machine, from its config alone: nothing has to be fetched."""

from __future__ import annotations

import time

import torch

from tallystick_model.anatomy import dissect
from tallystick_model.devices import CPU, Placement
from tallystick_model.loader import assemble
from tallystick_model.memory import piece_bytes
from tallystick_model.segments import Segment
from tallystick_model.skeleton import build_skeleton
from tallystick_model.span import Execution, SpanModel
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.types import Span

_ROWS = 8
"""Rows of a timed step: steps of a few sessions, packed."""

_REPEATS = 5
_FILL = 1 / 64


def layer_seconds(manifest: Manifest, device: torch.device = CPU) -> tuple[float, ...]:
    """Seconds per row for every layer: one layer inside the stack is timed, the others scaled by their bytes.

    Steps of few rows are bound by reading the weights, which is why bytes are the measure. Raises ManifestError.
    """
    sizes = _bytes_read(manifest)
    layer = min(range(manifest.layers), key=lambda index: (sizes[index], index))
    seconds = _time_layer(manifest, layer, device)
    return tuple(seconds * size / max(1, sizes[layer]) for size in sizes)


def _bytes_read(manifest: Manifest) -> list[int]:
    """Bytes of weights that a step reads, per layer: the head is read whole, of the embedding some rows only."""
    pieces = {piece.name: piece_bytes(piece, manifest) for piece in manifest.pieces}
    sizes = [pieces.get(f"layer.{index}", 0) for index in range(manifest.layers)]
    sizes[-1] += pieces.get("head", 0) + (pieces.get("embed", 0) if manifest.tied else 0)
    return sizes


def _time_layer(manifest: Manifest, layer: int, device: torch.device) -> float:
    skeleton = build_skeleton(manifest.config, manifest.architecture, manifest.labels)
    anatomy = dissect(skeleton)
    shapes = {name: tuple(weight.shape) for name, weight in skeleton.weights().items()}
    execution: Execution = "stock" if anatomy.obstacles else "canonical"
    span = Span(layer, layer + 1)

    def filled(piece: str, wanted: tuple[str, ...]) -> dict[str, torch.Tensor]:
        return {name: torch.full(shapes[name], _FILL) for name in wanted}

    spliced = assemble(skeleton, anatomy, span, filled, execution, manifest.numerics, Placement.on(device, span))
    model = SpanModel(manifest, span, spliced, execution)
    rows = torch.arange(_ROWS) % manifest.vocab
    if not manifest.takes_ids(span):
        rows = torch.full((_ROWS, manifest.width), _FILL)
    length = min(manifest.max_length, _ROWS * (_REPEATS + 1))
    memory = torch.full((_ROWS, manifest.width), _FILL) if 0 < manifest.encoder_layers <= layer else None
    times = []
    for _ in range(_REPEATS + 1):
        cache = model.new_cache(length, memory)
        begin = time.perf_counter()
        model.forward([Segment(cache, 0, rows, wanted=[])])
        if device.type == "cuda":  # a last layer returns nothing that would be waited for
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times[1:]) / _ROWS
