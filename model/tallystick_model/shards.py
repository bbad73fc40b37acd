"""One span over several ranks: which slice of every weight a rank holds, by the model's own plan, and reading no more.

transformers gives most models a plan (`tp_plan`): projections whose outputs are split over ranks, and ones whose inputs
are, so that a sum over ranks follows. Sums are rounded in another order than in one process: results are near the
unsharded ones, not equal, and of no numeric class.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from tallystick_model.loader import Source, assemble, checked_anatomy
from tallystick_model.memory import all_finite
from tallystick_model.skeleton import Skeleton
from tallystick_model.span import Spliced
from tallystick_protocol.errors import ConfigError, ManifestError
from tallystick_protocol.manifest import Manifest, Piece
from tallystick_protocol.types import Span

_HEADS = ("num_attention_heads", "num_key_value_heads")


def shard_span(manifest: Manifest, span: Span, open_piece: Callable[[Piece], Path], mesh: DeviceMesh) -> Spliced:
    """Build a span's model and fill it with this rank's slices. Called by every rank of a one-dimensional mesh.

    Raises ManifestError (reason="no_tp_plan") for a model without a plan, ConfigError for heads that cannot be dealt
    out evenly, ManifestError for pieces that are not what the manifest says.
    """
    if manifest.numerics != "fp32" or manifest.quantization is not None:
        raise ManifestError(
            f"{manifest.name} is {manifest.numerics}{', quantized' if manifest.quantization else ''}: only fp32 is"
            " dealt out to ranks; serve it with tensor_parallel = 1",
            reason="no_tp_plan",
        )
    skeleton, anatomy = checked_anatomy(manifest)
    plan = parallel_plan(skeleton, mesh.size())
    apply_tensor_parallelism(skeleton.model, mesh, plan)
    pieces = {piece.name: piece for piece in manifest.span_pieces(span)}
    return assemble(skeleton, anatomy, span, _reader(skeleton, pieces, open_piece, mesh), "stock")


def parallel_plan(skeleton: Skeleton, size: int) -> dict[str, str]:
    """{module or parameter of the model: its parallel style}. Raises as `shard_span` does."""
    config = skeleton.config.get_text_config()
    for name in _HEADS:
        if (count := getattr(config, name, None)) and count % size:
            raise ConfigError(f"{count} {name.removeprefix('num_').replace('_', ' ')} cannot be dealt to {size} ranks")
    try:
        plan: dict[str, str] = skeleton.model._resolve_parallel_plans(DistributedConfig(tp_size=size))[0]
    except ValueError as error:
        raise ManifestError(
            f"{type(skeleton.model).__name__} has no plan for tensor parallelism ({str(error)[:100]});"
            " serve it with tensor_parallel = 1",
            reason="no_tp_plan",
        ) from None
    return plan


def _reader(
    skeleton: Skeleton, pieces: dict[str, Piece], open_piece: Callable[[Piece], Path], mesh: DeviceMesh
) -> Source:
    placed = {name: weight for name, weight in skeleton.weights().items() if isinstance(weight, DTensor)}

    def read(name: str, wanted: tuple[str, ...]) -> dict[str, torch.Tensor]:
        if not wanted:
            return {}
        piece = pieces[name]
        path = open_piece(piece)
        if path.stat().st_size != piece.bytes:
            raise ManifestError(f"{name} has {path.stat().st_size} bytes, the manifest says {piece.bytes}")
        try:
            with safe_open(path, framework="pt") as file:
                if set(file.keys()) != set(piece.tensors):
                    raise ManifestError(f"{name} does not hold the tensors that the manifest lists")
                return {weight: _load(file.get_slice(weight), piece, weight, placed.get(weight)) for weight in wanted}
        except (SafetensorError, OSError) as error:
            raise ManifestError(f"{name} cannot be read as safetensors: {str(error)[:120]}") from None

    return read


def _load(stored: Any, piece: Piece, name: str, placed: DTensor | None) -> torch.Tensor:
    """This rank's part of a tensor in fp32, as the DTensor that `placed` on meta announces; all of it if not placed."""
    spec = piece.tensors[name]
    if stored.get_dtype() != spec.dtype or tuple(stored.get_shape()) != spec.shape:
        raise ManifestError(
            f"{name} is {stored.get_dtype()} {tuple(stored.get_shape())}, the manifest says {spec.dtype} {spec.shape}"
        )
    if placed is None:
        return _checked(name, stored[:])
    mesh, placement = placed.device_mesh, placed.placements[0]
    rank = mesh.get_local_rank()
    local = _checked(name, _slice(stored, spec.shape, placement, rank, mesh.size()))
    return DTensor.from_local(
        local, mesh, [placement], run_check=False, shape=torch.Size(spec.shape), stride=placed.stride()
    )


def _slice(stored: Any, shape: tuple[int, ...], placement: Any, rank: int, size: int) -> torch.Tensor:
    """A rank's slice: chunks as torch.chunk cuts them; for packed projections one of every packed part."""
    if not isinstance(placement, Shard | _StridedShard):
        return stored[:]
    dim = placement.dim % len(shape)
    parts = placement.split_factor if isinstance(placement, _StridedShard) else 1
    if shape[dim] % (parts * size) and parts > 1:
        raise ConfigError(f"a packed projection of {shape[dim]} cannot be dealt to {size} ranks")
    length = shape[dim] // parts
    chunk = -(-length // size)
    slices = []
    for part in range(parts):
        first = part * length + min(rank * chunk, length)
        last = part * length + min((rank + 1) * chunk, length)
        slices.append(stored[(slice(None),) * dim + (slice(first, last),)])
    return slices[0] if parts == 1 else torch.cat(slices, dim)


def _checked(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point():
        raise ManifestError(f"{name} is {tensor.dtype}; weights are floating point")
    converted = tensor.to(torch.float32, copy=True).contiguous()
    if not all_finite(converted):
        raise ManifestError(f"{name} holds NaN or infinity")
    return converted
