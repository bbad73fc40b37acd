"""Loading a span: pieces checked against the manifest tensor by tensor, mapped, packed layer by layer from there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tallystick_model.anatomy import Anatomy, dissect
from tallystick_model.canonical.execution import Canonical
from tallystick_model.devices import CPU, Carried, Placement, check_resident, move_buffers
from tallystick_model.ghosts import fill_blanks, outermost, splice
from tallystick_model.memory import WORTH_RELEASING, all_finite, release_freed_memory
from tallystick_model.publishing.quantize import read_weight, weight_shapes
from tallystick_model.skeleton import Lent, Skeleton, build_skeleton
from tallystick_model.span import Execution, SpanModel, Spliced
from tallystick_protocol.errors import ManifestError
from tallystick_protocol.manifest import Manifest, Numerics, Piece, Quantization, TensorSpec
from tallystick_protocol.types import Span

Source = Callable[[str, tuple[str, ...]], dict[str, torch.Tensor]]
"""(piece name, weights wanted of it) -> {weight: tensor}, as it is stored: what is kept of it is copied and converted
while its piece is filled."""

_WIDENED = (torch.float32, torch.bfloat16, torch.float16)
"""Formats of which every value is one of fp32."""


def load_span(
    manifest: Manifest,
    span: Span,
    open_piece: Callable[[Piece], Path],
    *,
    execution: Execution = "canonical",
    threads: int | None = None,
    dtype: torch.dtype = torch.float32,
    placement: Placement | None = None,
) -> SpanModel:
    """Load layers [start, end) from local piece files.

    open_piece: the path of a piece whose bytes were already checked against its CID. threads: torch's, None to leave.
    dtype: of the weights and of what is computed with them, in stock execution; canonical execution is fp32.
    placement: the devices of the layers; None for the CPU.
    Raises ManifestError for a piece that is not what the manifest says, a manifest that does not fit its own config,
    and (field reason="stock_only") a model without a canonical rule when execution is "canonical".
    Memory: the span's weights once in fp32, and one piece as it is stored.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    skeleton, anatomy = checked_anatomy(manifest, dtype)
    return fill_span(manifest, span, open_piece, skeleton, anatomy, execution, placement)


def fill_span(
    manifest: Manifest,
    span: Span,
    open_piece: Callable[[Piece], Path],
    skeleton: Skeleton,
    anatomy: Anatomy,
    execution: Execution = "canonical",
    placement: Placement | None = None,
) -> SpanModel:
    """`load_span` for a skeleton of one's own, which is used up, and an anatomy that was found before."""
    pieces = {piece.name: piece for piece in manifest.span_pieces(span)}

    def read(name: str, wanted: tuple[str, ...]) -> dict[str, torch.Tensor]:
        if not wanted:
            return {}
        return read_piece(open_piece(pieces[name]), pieces[name], wanted, manifest.quantization, mapped=True)

    spliced = assemble(skeleton, anatomy, span, read, execution, manifest.numerics, placement)
    return SpanModel(manifest, span, spliced, execution)


def checked_anatomy(manifest: Manifest, dtype: torch.dtype = torch.float32) -> tuple[Skeleton, Anatomy]:
    """The skeleton and anatomy of a manifest. Raises ManifestError where the manifest contradicts its own config."""
    skeleton = build_skeleton(manifest.config, manifest.architecture, manifest.labels, dtype)
    anatomy = dissect(skeleton)
    for field, one, other in (
        ("layers", manifest.layers, len(anatomy.layers)),
        ("encoder_layers", manifest.encoder_layers, anatomy.encoder_layers),
        ("width", manifest.width, anatomy.width),
        ("output", manifest.output, anatomy.output),
        ("causal", manifest.causal, anatomy.causal),
        ("tied", manifest.tied, anatomy.tied),
    ):
        if one != other:
            raise ManifestError(f"the manifest says {field} {str(one)[:60]}, its config makes {str(other)[:60]}")
    if manifest.vocab != vocabulary(skeleton.config):
        raise ManifestError(f"the manifest says vocab {manifest.vocab}, its config another")
    weights = skeleton.weights()
    for piece in manifest.pieces:
        expected = set(anatomy.weights_of(piece.name))
        shapes = weight_shapes(piece, manifest.quantization)
        _same_names(piece.name, set(shapes), expected)
        for name, shape in shapes.items():
            if shape != tuple(weights[name].shape):
                raise ManifestError(f"{name} has shape {shape} in the manifest, {tuple(weights[name].shape)} here")
            if (piece.tensors[name].dtype == "I64") == weights[name].is_floating_point():
                raise ManifestError(f"{name} is {piece.tensors[name].dtype}, its config makes it {weights[name].dtype}")
    held = {piece.name for piece in manifest.pieces}
    for name, role in anatomy.roles.items():
        if role not in held and name not in anatomy.tied:
            raise ManifestError(f"no piece holds {name} ({role})")
    return skeleton, anatomy


def vocabulary(config: Any) -> int:
    """How many token ids a model of this config knows. Raises ManifestError when it does not say."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(size, int):
        raise ManifestError("the config has no vocab_size")
    return size


def read_piece(
    path: Path, piece: Piece, wanted: Iterable[str], quantization: Quantization | None = None, *, mapped: bool = False
) -> dict[str, torch.Tensor]:
    """The wanted tensors of a piece's file, in fp32 but for integers. mapped: as they are stored, in the file's mapping
    where that is a floating-point format of at most 32 bits.

    Raises ManifestError unless the file is what the manifest lists.
    """
    try:
        size = path.stat().st_size
        if size != piece.bytes:
            raise ManifestError(f"{piece.name} has {size} bytes, the manifest says {piece.bytes}")
        with safe_open(path, framework="pt") as file:
            _same_names(piece.name, set(file.keys()), set(piece.tensors))
            for name, spec in piece.tensors.items():
                _same_spec(name, file.get_slice(name), spec)
            return {name: _checked(name, read_weight(file, name, piece, quantization), mapped) for name in wanted}
    except (SafetensorError, OSError) as error:
        raise ManifestError(f"{piece.name} cannot be read as safetensors: {str(error)[:120]}") from None


def assemble(
    skeleton: Skeleton,
    anatomy: Anatomy,
    span: Span,
    source: Source,
    execution: Execution,
    numerics: Numerics = "fp32",
    placement: Placement | None = None,
) -> Spliced:
    """Splice the span into the skeleton, in place, and fill it."""
    placement = placement or Placement.on(CPU, span)
    fill_blanks(skeleton, anatomy, span, placement.first)
    passage = splice(skeleton, anatomy, span, placement)
    carried = _outside(skeleton, anatomy, placement) if passage.spread else {}
    rules = Canonical(skeleton, anatomy, span, numerics) if execution == "canonical" else None
    if execution == "stock" and numerics != "fp32":
        rules = Canonical(skeleton, anatomy, span, numerics, stock=True)
    for piece, weights in _pieces_of(anatomy, span):
        tensors = source(piece, tuple(sorted({stored for _, stored in weights})))
        lent: list[Lent] = []
        for name, stored in weights:
            device = placement.of_weight("tied" if name in anatomy.tied else anatomy.roles[name])
            lent.append(Lent(skeleton.model, name, stored, tensors[stored].to(device)))
        size = sum(tensor.nbytes for tensor in tensors.values())
        tensors.clear()  # so that a plain weight is free once it is packed
        if rules is not None:
            rules.fill({name for name, _ in weights})
        copies: dict[Any, torch.Tensor] = {}
        for one in lent:
            one.keep(copies)
        if size >= WORTH_RELEASING:
            release_freed_memory()
    if passage.spread:
        _settle(skeleton, anatomy, span, placement, carried)
    return Spliced(skeleton, anatomy, passage, rules, rules.finish() if rules is not None else None)


def _outside(skeleton: Skeleton, anatomy: Anatomy, placement: Placement) -> dict[str, torch.device]:
    """{module outside the layers: its device}, of those that may be given what is on another one."""
    shared = {name for name, role in anatomy.roles.items() if role == "shared"}
    head = {name for name, role in anatomy.roles.items() if role == "head"} | set(anatomy.tied)
    found = dict.fromkeys(outermost(skeleton, shared), placement.first)
    return found | dict.fromkeys(outermost(skeleton, head), placement.last)


def _settle(
    skeleton: Skeleton, anatomy: Anatomy, span: Span, placement: Placement, carried: dict[str, torch.device]
) -> None:
    """Put on their modules' devices what modules computed when they were built, and what `carried` ones are given.

    carried: {module outside the layers: its device}. Raises ManifestError where layers on two devices share weights.
    """
    model, stack = skeleton.model, anatomy.layers[span.start].stack
    layers = list(skeleton.stack(stack))
    elsewhere = {id(inner) for layer in layers for inner in layer.modules()}
    for name, device in carried.items():
        module = model.get_submodule(name)
        if id(module) not in elsewhere:
            move_buffers(module.modules(), device)
            module.forward = Carried(module.forward, device)
            elsewhere |= {id(inner) for inner in module.modules()}
    move_buffers([inner for inner in model.modules() if id(inner) not in elsewhere], placement.first)
    served = [(index, layers[anatomy.layers[index].module]) for index in range(span.start, span.end)]
    for index, layer in served:
        move_buffers(layer.modules(), placement.of_layer(index))
    for index, layer in served:
        check_resident(layer, index, placement.of_layer(index))


def _pieces_of(anatomy: Anatomy, span: Span) -> list[tuple[str, list[tuple[str, str]]]]:
    """(piece, [(weight to fill, weight that is stored)]) for a span, a layer at a time."""
    stack = anatomy.layers[span.start].stack
    whole = anatomy.stack_span(stack)
    last = span.end == len(anatomy.layers)
    pieces = ["shared", *(["embed"] if span.start == whole.start else [])]
    pieces += [f"layer.{k}" for k in range(span.start, span.end)] + (["head"] if last else [])
    plan: dict[str, list[tuple[str, str]]] = {piece: [] for piece in pieces}
    for name, role in anatomy.roles.items():
        if role not in plan or name in anatomy.tied or (role == "embed" and name not in anatomy.prologues[stack]):
            continue
        plan[role].append((name, anatomy.aliases.get(name, name)))
    found = list(plan.items())
    if last and anatomy.tied:
        found.append(("embed", list(anatomy.tied.items())))
    return found


def _same_names(piece: str, found: set[str], expected: set[str]) -> None:
    for what, names in (("lacks", expected - found), ("holds, unasked,", found - expected)):
        if names:
            raise ManifestError(f"{piece} {what} {', '.join(sorted(names)[:3])}")


def _same_spec(name: str, found: Any, spec: TensorSpec) -> None:
    if found.get_dtype() != spec.dtype or tuple(found.get_shape()) != spec.shape:
        raise ManifestError(
            f"{name} is {found.get_dtype()} {tuple(found.get_shape())}, the manifest says {spec.dtype} {spec.shape}"
        )


def _checked(name: str, tensor: torch.Tensor, mapped: bool) -> torch.Tensor:
    """Finite fp32 in memory of its own, or indices. mapped: finite, as it is stored."""
    if tensor.dtype is torch.int64:
        return tensor.clone()
    if not tensor.is_floating_point():
        raise ManifestError(f"{name} is {tensor.dtype}; weights are floating point")
    if not mapped or tensor.dtype not in _WIDENED:
        tensor = tensor.to(torch.float32, copy=True)
    if not all_finite(tensor):
        raise ManifestError(f"{name} holds NaN or infinity")
    return tensor
