"""Publishing a checkpoint: its tensors streamed into pieces, its canary run span by span, one manifest written."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from tallystick_model.anatomy import Anatomy, dissect
from tallystick_model.checkpoint import Checkpoint, match_names
from tallystick_model.companions import find_licence, generation_settings, pooling, read_tokenizer, tokenizer_files
from tallystick_model.config import checkpoint_config
from tallystick_model.loader import fill_span
from tallystick_model.segments import Segment
from tallystick_model.skeleton import Skeleton, build_skeleton
from tallystick_model.span import SpanModel
from tallystick_protocol.content.cid import Cid, Codec
from tallystick_protocol.content.store import Store
from tallystick_protocol.errors import ManifestError
from tallystick_protocol.manifest import Canary, FileRef, Manifest, Piece, PieceKind, TensorSpec
from tallystick_protocol.types import Span

CANARY_ROWS = 48
CANARY_BLOCK_BYTES = 1 << 20
CANARY_TEXT = (
    "It was a bright cold day in April, and the clocks were striking thirteen: 3.14159, naïve, 東京, def f(x):"
)
NORM_MARGIN = 64.0
"""Row norms are accepted down to the smallest one calibrated / 64, and up to the largest one x 64."""

Progress = Callable[[str], None]


def publish(
    checkpoint_dir: Path,
    store: Store,
    *,
    name: str | None = None,
    licence: str | None = None,
    progress: Progress = lambda step: None,
) -> Manifest:
    """Put a local Hugging Face checkpoint into the store, piece by piece, and return its manifest, stored as well.

    The same checkpoint gives the same bytes. Needs memory for one piece, and disk for the model next to the store.
    Raises ManifestError, naming the cause and what to do, for a checkpoint that cannot be served exactly.
    """
    checkpoint = Checkpoint(checkpoint_dir)
    config = checkpoint_config(checkpoint.config)
    skeleton = build_skeleton(config, _architecture(checkpoint))
    anatomy = dissect(skeleton)
    if anatomy.obstacles:
        raise ManifestError(
            f"no canonical execution for {_architecture(checkpoint)}: {'; '.join(anatomy.obstacles[:3])}",
            reason="stock_only",
        )
    matched = match_names(checkpoint, skeleton, anatomy)
    files = tokenizer_files(checkpoint, skeleton.config.vocab_size)
    said = licence or find_licence(checkpoint)
    with tempfile.TemporaryDirectory(prefix="tallystick-publish-") as folder:
        pieces = {}
        for index, piece in enumerate(names := _piece_names(anatomy)):
            progress(f"piece {index + 1} of {len(names)}: {piece}")
            pieces[piece] = _write_piece(checkpoint, matched, anatomy, piece, Path(folder), store)
        draft = Manifest(
            name=name or checkpoint_dir.name,
            licence=said,
            architecture=_architecture(checkpoint),
            config=config,
            task="text-generation" if anatomy.output == "logits" else "feature-extraction",
            output=anatomy.output,
            labels=(),
            causal=anatomy.causal,
            numerics="fp32",
            quantization=None,
            encoder_layers=0,
            layers=len(anatomy.layers),
            width=anatomy.width,
            vocab=skeleton.config.vocab_size,
            max_length=_max_length(skeleton),
            pieces=tuple(pieces.values()),
            tied=anatomy.tied,
            tokenizer={
                file: FileRef(store.put_file(path), path.stat().st_size) for file, path in sorted(files.items())
            },
            generation=generation_settings(
                checkpoint, skeleton.config.vocab_size, needs_eos=anatomy.output == "logits"
            ),
            pooling=pooling(checkpoint) if anatomy.output == "hidden" else None,
            norms=(),
            canary=Canary((), (), Cid.of_raw(b"")),
        )
        tokenizer = read_tokenizer(files["tokenizer.json"])
        encoded = tokenizer.encode(CANARY_TEXT, add_special_tokens=False).ids
        walk = _Walk(draft, anatomy, lambda piece: Path(folder) / piece.name, store, progress)
        manifest = walk.calibrated(_canary_ids(encoded, draft))
    block = manifest.to_bytes()
    store.put_block(block, Codec.RAW)
    return Manifest.from_bytes(block)


def _architecture(checkpoint: Checkpoint) -> str:
    named = checkpoint.config.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise ManifestError("config.json must name one class in `architectures`")
    return named[0]


def _max_length(skeleton: Skeleton) -> int:
    length = getattr(skeleton.config, "max_position_embeddings", None)
    if not isinstance(length, int):
        raise ManifestError("the config has no max_position_embeddings: add the longest sequence it was trained for")
    return length


def _piece_names(anatomy: Anatomy) -> list[str]:
    """Pieces in the manifest's order; `shared`, `embed` and `head` only where something is in them."""
    names = ["embed", *(f"layer.{index}" for index in range(len(anatomy.layers))), "shared", "head"]
    return [name for name in names if name.startswith("layer.") or anatomy.weights_of(name)]


def _write_piece(
    checkpoint: Checkpoint, matched: dict[str, str], anatomy: Anatomy, piece: str, folder: Path, store: Store
) -> Piece:
    tensors = {name: checkpoint.tensor(matched[name]).contiguous() for name in anatomy.weights_of(piece)}
    path = folder / piece
    save_file(tensors, path)  # sorted by alignment and name, no metadata: the same bytes every time
    specs = {name: TensorSpec(checkpoint.spec(matched[name])[0], tuple(tensors[name].shape)) for name in tensors}
    kinds: dict[str, PieceKind] = {"embed": "embed", "shared": "shared", "head": "head"}
    index = int(piece.removeprefix("layer.")) if piece.startswith("layer.") else 0
    return Piece(kinds.get(piece, "layer"), index, store.put_file(path), path.stat().st_size, specs)


def _canary_ids(encoded: list[int], draft: Manifest) -> torch.Tensor:
    """Up to CANARY_ROWS ids: the canary text as the tokenizer cuts it, then pseudo-random ones."""
    count = max(1, min(CANARY_ROWS, draft.max_length, CANARY_BLOCK_BYTES // (4 * draft.width)))
    return torch.tensor((encoded + _arithmetic_ids(count, draft.vocab))[:count])


def _arithmetic_ids(count: int, vocab: int) -> list[int]:
    """Ids that look random and are the same everywhere."""
    digests = (hashlib.sha256(b"tallystick canary %d" % index).digest() for index in range(count))
    return [int.from_bytes(digest[:8], "big") % vocab for digest in digests]


class _Walk:
    """Runs sequences through a model one layer at a time, so that memory holds one layer."""

    def __init__(
        self,
        draft: Manifest,
        anatomy: Anatomy,
        open_piece: Callable[[Piece], Path],
        store: Store,
        progress: Progress,
    ) -> None:
        self._draft, self._anatomy, self._open_piece = draft, anatomy, open_piece
        self._store, self._progress = store, progress

    def calibrated(self, canary: torch.Tensor) -> Manifest:
        """The draft with its canary and its norms; the canary is the first sequence that walks."""
        draft, count = self._draft, min(64, self._draft.max_length)
        repeated = torch.full((count,), int(canary[0]))
        rows: list[torch.Tensor] = [canary, torch.tensor(_arithmetic_ids(count, draft.vocab)), repeated]
        blocks: list[Cid] = []
        norms: list[tuple[float, float]] = []
        output = Cid.of_raw(b"")
        for index in range(draft.layers):
            self._progress(f"canary: layer {index + 1} of {draft.layers}")
            model = self._load(Span(index, index + 1))
            walked = [model.rows_between(Segment(model.new_cache(draft.max_length), 0, one)) for one in rows]
            if index == 0:
                blocks.append(self._keep(walked[0][0]))
                norms.append(_norm_range([entered for entered, _ in walked]))
            if model.is_last:
                segment = Segment(model.new_cache(draft.max_length), 0, rows[0], wanted=[len(canary) - 1])
                output = self._keep(model.forward([segment])[0])
            rows = [left for _, left in walked]
            blocks.append(self._keep(rows[0]))
            norms.append(_norm_range(rows))
        ids = tuple(int(token) for token in canary)
        return replace(draft, norms=tuple(norms), canary=Canary(ids, tuple(blocks), output))

    def _load(self, span: Span) -> SpanModel:
        skeleton = build_skeleton(self._draft.config, self._draft.architecture)
        return fill_span(self._draft, span, self._open_piece, skeleton, self._anatomy)

    def _keep(self, rows: torch.Tensor) -> Cid:
        if not bool(torch.isfinite(rows).all()):
            raise ManifestError("the model computes NaN or infinity from ordinary text: its weights overflow in fp32")
        return self._store.put_block(rows.numpy().astype("<f4").tobytes(), Codec.RAW)


def _norm_range(sequences: list[torch.Tensor]) -> tuple[float, float]:
    """The smallest and largest row norm, with the margin, to six digits."""
    norms = torch.cat([rows.double().norm(dim=1) for rows in sequences])
    low, high = float(norms.min()) / NORM_MARGIN, float(norms.max()) * NORM_MARGIN
    return float(f"{low:.6g}"), float(f"{max(high, 1e-30):.6g}")
