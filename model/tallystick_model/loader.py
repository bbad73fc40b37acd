"""Loading a span: pieces checked against the manifest tensor by tensor, converted to fp32, packed layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from tallystick_model.anatomy import LINEAR_TYPES, Anatomy, dissect
from tallystick_model.attention import Batch, TiledSeat, attend_with, use_tallystick_attention
from tallystick_model.ghosts import splice, watch_ends
from tallystick_model.kernels import BlockwiseActivation, BlockwiseScope, CanonicalLinear
from tallystick_model.publishing.quantize import read_weight, weight_shapes
from tallystick_model.skeleton import Skeleton, build_skeleton, set_weight
from tallystick_model.span import Execution, SpanModel, Spliced
from tallystick_protocol.errors import ManifestError
from tallystick_protocol.manifest import Manifest, Piece, Quantization, TensorSpec
from tallystick_protocol.types import Span

Source = Callable[[str, tuple[str, ...]], dict[str, torch.Tensor]]
"""(piece name, weights wanted of it) -> {weight: fp32 tensor of its own memory}."""


def load_span(
    manifest: Manifest,
    span: Span,
    open_piece: Callable[[Piece], Path],
    *,
    execution: Execution = "canonical",
    threads: int | None = None,
) -> SpanModel:
    """Load layers [start, end) from local piece files.

    open_piece: the path of a piece whose bytes were already checked against its CID. threads: torch's, None to leave.
    Raises ManifestError for a piece that is not what the manifest says, a manifest that does not fit its own config,
    and (field reason="stock_only") a model without a canonical rule when execution is "canonical".
    Memory: the span's weights once in fp32, and one piece.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    skeleton, anatomy = checked_anatomy(manifest)
    return fill_span(manifest, span, open_piece, skeleton, anatomy, execution)


def fill_span(
    manifest: Manifest,
    span: Span,
    open_piece: Callable[[Piece], Path],
    skeleton: Skeleton,
    anatomy: Anatomy,
    execution: Execution = "canonical",
) -> SpanModel:
    """`load_span` for a skeleton of one's own, which is used up, and an anatomy that was found before."""
    pieces = {piece.name: piece for piece in manifest.span_pieces(span)}

    def read(name: str, wanted: tuple[str, ...]) -> dict[str, torch.Tensor]:
        if not wanted:
            return {}
        return read_piece(open_piece(pieces[name]), pieces[name], wanted, manifest.quantization)

    spliced = assemble(skeleton, anatomy, span, read, execution)
    return SpanModel(manifest, span, spliced, execution)


def checked_anatomy(manifest: Manifest) -> tuple[Skeleton, Anatomy]:
    """The skeleton and anatomy of a manifest. Raises ManifestError where the manifest contradicts its own config."""
    skeleton = build_skeleton(manifest.config, manifest.architecture)
    anatomy = dissect(skeleton)
    said = (manifest.layers, manifest.width, manifest.output, manifest.causal, manifest.tied)
    found = (len(skeleton.layers), anatomy.width, anatomy.output, anatomy.causal, anatomy.tied)
    for field, one, other in zip(("layers", "width", "output", "causal", "tied"), said, found, strict=True):
        if one != other:
            raise ManifestError(f"the manifest says {field} {str(one)[:60]}, its config makes {str(other)[:60]}")
    if manifest.vocab != getattr(skeleton.config, "vocab_size", None):
        raise ManifestError(f"the manifest says vocab {manifest.vocab}, its config another")
    weights = skeleton.weights()
    for piece in manifest.pieces:
        expected = set(anatomy.weights_of(piece.name))
        shapes = weight_shapes(piece, manifest.quantization)
        _same_names(piece.name, set(shapes), expected)
        for name, shape in shapes.items():
            if shape != tuple(weights[name].shape):
                raise ManifestError(f"{name} has shape {shape} in the manifest, {tuple(weights[name].shape)} here")
    held = {piece.name for piece in manifest.pieces}
    for name, role in anatomy.roles.items():
        if role not in held and name not in anatomy.tied:
            raise ManifestError(f"no piece holds {name} ({role})")
    return skeleton, anatomy


def read_piece(
    path: Path, piece: Piece, wanted: Iterable[str], quantization: Quantization | None = None
) -> dict[str, torch.Tensor]:
    """The wanted tensors of a piece's file in fp32. Raises ManifestError unless the file is what the manifest lists."""
    try:
        size = path.stat().st_size
        if size != piece.bytes:
            raise ManifestError(f"{piece.name} has {size} bytes, the manifest says {piece.bytes}")
        with safe_open(path, framework="pt") as file:
            _same_names(piece.name, set(file.keys()), set(piece.tensors))
            for name, spec in piece.tensors.items():
                _same_spec(name, file.get_slice(name), spec)
            return {name: _as_fp32(name, read_weight(file, name, piece, quantization)) for name in wanted}
    except (SafetensorError, OSError) as error:
        raise ManifestError(f"{piece.name} cannot be read as safetensors: {str(error)[:120]}") from None


def assemble(skeleton: Skeleton, anatomy: Anatomy, span: Span, source: Source, execution: Execution) -> Spliced:
    """Splice the span into the skeleton, in place, and fill it. Raises ManifestError (reason="stock_only")."""
    canonical = execution == "canonical"
    if canonical and anatomy.obstacles:
        raise ManifestError(
            f"no canonical execution for this model: {'; '.join(anatomy.obstacles[:3])}", reason="stock_only"
        )
    passage = splice(skeleton, anatomy, span)
    batch, selection = Batch(), list[torch.Tensor]()
    if canonical:
        use_tallystick_attention(skeleton.config)
    head = _head(skeleton)
    for piece, weights in _pieces_of(anatomy, span):
        tensors = source(piece, tuple(sorted({stored for _, stored in weights})))
        for name, stored in weights:
            set_weight(skeleton.model, name, tensors[stored])
        if canonical:
            _make_canonical(skeleton, {name for name, _ in weights}, head, selection)
    if canonical:
        _run_in_blocks(skeleton, anatomy, span)
        for index in range(span.start, span.end):
            plan = anatomy.layers[index].attention
            assert plan is not None
            attend_with(skeleton.layers[index], TiledSeat(index, plan, batch))
    watch_ends(skeleton, anatomy, span, passage)
    return Spliced(skeleton, anatomy, passage, batch, selection, selects=canonical and head is not None)


def _pieces_of(anatomy: Anatomy, span: Span) -> list[tuple[str, list[tuple[str, str]]]]:
    """(piece, [(weight to fill, weight that is stored)]) for a span, a layer at a time."""
    first, last = span.start == 0, span.end == len(anatomy.layers)
    pieces = ["shared", *(["embed"] if first else []), *(f"layer.{k}" for k in range(span.start, span.end))]
    pieces += ["head"] if last else []
    plan = []
    for piece in pieces:
        names = [name for name, role in anatomy.roles.items() if role == piece and name not in anatomy.tied]
        plan.append((piece, [(name, anatomy.aliases.get(name, name)) for name in names]))
    if last and anatomy.tied:
        plan.append(("embed", list(anatomy.tied.items())))
    return plan


def _head(skeleton: Skeleton) -> str | None:
    """The name of the module that makes the logits, when it is a product that rows can be selected for."""
    module = skeleton.model.get_output_embeddings()
    if type(module) not in LINEAR_TYPES:
        return None
    return next((name for name, found in skeleton.model.named_modules() if found is module), None)


def _make_canonical(skeleton: Skeleton, filled: set[str], head: str | None, selection: list[torch.Tensor]) -> None:
    """Pack every linear module that has just been filled; its plain weights are freed."""
    for name, module in list(skeleton.model.named_modules()):
        if type(module) in LINEAR_TYPES and f"{name}.weight" in filled:
            if module.bias is not None and module.bias.device.type == "meta":
                continue  # its bias comes with another piece
            packed: nn.Module = CanonicalLinear.of(module)
            _replace(skeleton.model, name, Selecting(packed, selection) if name == head else packed)


class Selecting(nn.Module):
    """The head, for the rows that are wanted: (1, n, width) -> (1, len(selection), vocab)."""

    def __init__(self, inner: nn.Module, selection: list[torch.Tensor]) -> None:
        super().__init__()
        self.inner = inner
        self.__dict__["selection"] = selection

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen: list[torch.Tensor] = self.__dict__["selection"]
        out: torch.Tensor = self.inner(x[:, chosen[0]] if chosen else x)
        return out


def _run_in_blocks(skeleton: Skeleton, anatomy: Anatomy, span: Span) -> None:
    stack = skeleton.stack + "."
    for name in sorted(anatomy.blockwise - {""}, key=len, reverse=True):
        layer = name[len(stack) :].partition(".")[0] if name.startswith(stack) else None
        if layer is not None and not span.start <= int(layer) < span.end:
            continue
        module = skeleton.model.get_submodule(name)
        fits = BlockwiseActivation.fits(module)
        _replace(skeleton.model, name, BlockwiseActivation(module) if fits else BlockwiseScope(module))


def _replace(model: Any, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    if isinstance(owner, nn.ModuleList):
        owner[int(leaf)] = module
    else:
        setattr(owner, leaf, module)


def _same_names(piece: str, found: set[str], expected: set[str]) -> None:
    for what, names in (("lacks", expected - found), ("holds, unasked,", found - expected)):
        if names:
            raise ManifestError(f"{piece} {what} {', '.join(sorted(names)[:3])}")


def _same_spec(name: str, found: Any, spec: TensorSpec) -> None:
    if found.get_dtype() != spec.dtype or tuple(found.get_shape()) != spec.shape:
        raise ManifestError(
            f"{name} is {found.get_dtype()} {tuple(found.get_shape())}, the manifest says {spec.dtype} {spec.shape}"
        )


def _as_fp32(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A copy of its own (the file may change after it was checked), finite."""
    if not tensor.is_floating_point():
        raise ManifestError(f"{name} is {tensor.dtype}; weights are floating point")
    converted = tensor.to(torch.float32, copy=True)
    if not bool(torch.isfinite(converted).all()):
        raise ManifestError(f"{name} holds NaN or infinity")
    return converted
