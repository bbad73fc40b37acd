"""Weight-only quantisation: which weights, how they are stored, and back to fp32 when a span is loaded.

A matrix is cut into groups of `group` consecutive values of its last dimension (the last group may be shorter). With
m = 127 for int8 and 7 for int4, a group holds q = round(w / s) in [-m, m] with s = max|w| / m, ties to even; a group
of zeros has s = 1. The weight is q * s, one fp32 product, so everybody gets the same bits.

    int8   <name> I8, the weight's shape
    int4   <name> U8, last dimension halved: value 2i in the low four bits, 2i+1 in the high ones, both as q + 8
    both   <name>.scale F32, last dimension ceil(n / group)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tallystick_model.anatomy import LINEAR_TYPES
from tallystick_model.skeleton import Skeleton
from tallystick_protocol.errors import ManifestError
from tallystick_protocol.manifest import Piece, Quantization, TensorSpec

SCALE = ".scale"
GROUPS = {8: 128, 4: 32}
"""Values per scale that `publish` takes for each number of bits."""
MIN_VALUES = 2048
_SMALLEST = 1e-30
"""A group whose largest value is below is stored as zeros: its scale would be no normal number."""


def quantised_weights(skeleton: Skeleton, roles: Mapping[str, str], quantization: Quantization) -> frozenset[str]:
    """The weights that are stored as integers: matrices of linear modules, and of experts, within layers.

    Embeddings, norms, biases, convolutions, the head, and matrices of fewer than MIN_VALUES values stay as they are; so
    do those of an odd width with 4 bits.
    """
    found = set()
    for prefix, module in skeleton.model.named_modules():
        for leaf, tensor in module.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}" if prefix else leaf
            linear = type(module) in LINEAR_TYPES and leaf == "weight"
            experts = tensor.ndim == 3 and not isinstance(module, nn.modules.conv._ConvNd)
            packs = quantization.bits == 8 or tensor.shape[-1:].numel() % 2 == 0
            if (linear or experts) and packs and tensor.numel() >= MIN_VALUES:
                found.add(name)
    return frozenset(name for name in found if roles.get(name, "").startswith("layer."))


def stored_specs(name: str, shape: tuple[int, ...], quantization: Quantization) -> dict[str, TensorSpec]:
    """What stands in a piece for a quantised weight."""
    *rows, width = shape
    values = TensorSpec("I8", shape) if quantization.bits == 8 else TensorSpec("U8", (*rows, width // 2))
    return {name: values, name + SCALE: TensorSpec("F32", (*rows, -(-width // quantization.group)))}


def scales_of(weight: torch.Tensor, quantization: Quantization) -> torch.Tensor:
    """The fp32 scales of whole rows. Raises ManifestError for values beyond fp32's range."""
    largest = _grouped(weight.float(), quantization.group).abs().amax(dim=-1)
    return torch.where(largest < _SMALLEST, torch.ones_like(largest), largest / _top(quantization))


def values_of(weight: torch.Tensor, quantization: Quantization) -> torch.Tensor:
    """The integers of whole rows, as they are stored."""
    scales = scales_of(weight, quantization)
    top = _top(quantization)
    grouped = _grouped(weight.float(), quantization.group)
    small = grouped.abs().amax(dim=-1, keepdim=True) < _SMALLEST
    rounded = torch.where(small, torch.zeros_like(grouped), torch.round(grouped / scales[..., None]))
    whole = rounded.clamp_(-top, top).flatten(-2)[..., : weight.shape[-1]].to(torch.int8)
    if quantization.bits == 8:
        return whole.contiguous()
    nibbles = (whole + 8).to(torch.uint8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def dequantise(name: str, values: torch.Tensor, scales: torch.Tensor, quantization: Quantization) -> torch.Tensor:
    """The fp32 weight. Raises ManifestError for integers or scales that quantisation does not make."""
    if not bool((torch.isfinite(scales) & (scales >= torch.finfo(torch.float32).tiny)).all()):
        raise ManifestError(f"{name}: a scale is not a positive finite number")
    whole = values
    if quantization.bits == 4:
        whole = torch.stack((values & 15, values >> 4), dim=-1).flatten(-2).to(torch.int8) - 8
    if whole.numel() and int(whole.min()) < -_top(quantization):
        raise ManifestError(f"{name}: an integer beyond {_top(quantization)} in size")
    width = whole.shape[-1]
    spread = scales.repeat_interleave(quantization.group, dim=-1)[..., :width]
    weight = spread.mul_(whole) if spread.shape == whole.shape else spread * whole
    if not bool(torch.isfinite(weight).all()):
        raise ManifestError(f"{name}: a scale is too large")
    return weight


def read_weight(file: Any, name: str, piece: Piece, quantization: Quantization | None) -> torch.Tensor:
    """A weight of an opened piece: as it is stored, or in fp32 when it is stored as integers. Raises ManifestError."""
    tensor: torch.Tensor = file.get_tensor(name)
    if quantization is None or name + SCALE not in piece.tensors:
        return tensor
    return dequantise(name, tensor, file.get_tensor(name + SCALE), quantization)


def weight_shapes(piece: Piece, quantization: Quantization | None) -> dict[str, tuple[int, ...]]:
    """{weight: shape} of a piece, integers and scales taken as the weight they stand for.

    Raises ManifestError where they do not belong together.
    """
    tensors = piece.tensors
    scaled = {name for name in tensors if name + SCALE in tensors} if quantization is not None else set[str]()
    shapes = {}
    for name, spec in tensors.items():
        if name.removesuffix(SCALE) in scaled and name.endswith(SCALE):
            continue
        shapes[name] = spec.shape
        if quantization is None or name not in scaled:
            continue
        packed = quantization.bits == 4
        shapes[name] = (*spec.shape[:-1], spec.shape[-1] * 2) if packed and spec.shape else spec.shape
        expected = stored_specs(name, shapes[name], quantization) if len(spec.shape) > 1 else {}
        if any(tensors[part] != expected.get(part) for part in (name, name + SCALE)):
            said = f"int{quantization.bits} in groups of {quantization.group}"
            raise ManifestError(f"{name} and its scales are not {said}")
    return shapes


def _grouped(weight: torch.Tensor, group: int) -> torch.Tensor:
    """(…, n) as (…, ceil(n / group), group), zeros behind."""
    missing = -weight.shape[-1] % group
    padded = nn.functional.pad(weight, (0, missing)) if missing else weight
    return padded.unflatten(-1, (-1, group))


def _top(quantization: Quantization) -> int:
    return 127 if quantization.bits == 8 else 7

