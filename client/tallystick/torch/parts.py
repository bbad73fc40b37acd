"""What a client holds of a served model itself: its embedding, and the names and shapes of its linear modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tallystick_model.gradients import linear_shape
from tallystick_model.loader import read_piece
from tallystick_model.skeleton import build_skeleton, set_weight
from tallystick_protocol.errors import ConfigError, ManifestError
from tallystick_protocol.manifest import Manifest


def linear_modules(manifest: Manifest) -> dict[str, tuple[int, int]]:
    """{dotted name: (in, out)} of every linear module in the layers; built without weights. Raises ManifestError."""
    skeleton = build_skeleton(manifest.config, manifest.architecture)
    modules = skeleton.stack(0).named_modules()
    shapes = {f"{skeleton.stacks[0]}.{name}": linear_shape(module) for name, module in modules}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def targeted(shapes: dict[str, tuple[int, int]], targets: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """The modules whose names end in one of `targets`, as PEFT's target_modules. Raises ConfigError for none."""
    found = {n: s for n, s in shapes.items() if any(n == target or n.endswith("." + target) for target in targets)}
    if not found:
        leaves = sorted({name.rpartition(".")[2] for name in shapes})
        raise ConfigError(f"no linear module is called {', '.join(targets)}; there are {', '.join(leaves[:20])}")
    return found


def embedding(manifest: Manifest, path: Path) -> torch.nn.Module:
    """The model's own module that embeds token ids, fp32, frozen; path: the piece "embed". Raises ManifestError."""
    piece = next(piece for piece in manifest.pieces if piece.name == "embed")
    model: Any = build_skeleton(manifest.config, manifest.architecture).model
    module: torch.nn.Module = model.get_input_embeddings()
    prefix = next(name for name, found in model.named_modules() if found is module)
    names = [f"{prefix}.{name}" for name, _ in module.named_parameters()]
    if not set(names) <= set(piece.tensors):
        raise ManifestError(f"{manifest.name} embeds its ids by more than one table: embeddings stay at the nodes")
    for name, tensor in read_piece(path, piece, names, manifest.quantization).items():
        rounded = tensor.bfloat16().float() if manifest.numerics == "bf16w" else tensor  # as nodes hold it
        set_weight(model, name, rounded)
    return module.requires_grad_(False)
