"""Makes the canary: a few sequences walk through the model a layer at a time, so that memory holds one layer.

The first sequence is the canary, the other two widen the range of row norms that is accepted. Where an encoder ends,
its result (after its last norm) is the row block of that boundary, and the decoder's memory; the decoder then starts
over from the same ids.
"""

from __future__ import annotations

import gc
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tallystick_model.anatomy import Anatomy
from tallystick_model.loader import fill_span
from tallystick_model.publishing.job import Job
from tallystick_model.publishing.progress import Meter
from tallystick_model.segments import Segment
from tallystick_model.skeleton import build_skeleton
from tallystick_model.span import SpanModel
from tallystick_protocol.content.cid import Cid, Codec
from tallystick_protocol.content.store import Store
from tallystick_protocol.errors import ManifestError
from tallystick_protocol.manifest import Canary, Manifest, Piece
from tallystick_protocol.types import Span

CANARY_ROWS = 48
CANARY_BLOCK_BYTES = 1 << 20
CANARY_TEXT = (
    "It was a bright cold day in April, and the clocks were striking thirteen: 3.14159, naïve, 東京, def f(x):"
)
NORM_MARGIN = 64.0
"""Row norms are accepted down to the smallest one calibrated / 64, and up to the largest one x 64."""


def canary_ids(encoded: tuple[int, ...], draft: Manifest) -> torch.Tensor:
    """Up to CANARY_ROWS ids: the canary text as the tokenizer cuts it, then pseudo-random ones."""
    count = max(1, min(CANARY_ROWS, draft.max_length, CANARY_BLOCK_BYTES // (4 * draft.width)))
    known = [token for token in encoded if token < draft.vocab]
    return torch.tensor((known + _arithmetic_ids(count, draft.vocab))[:count])


def _arithmetic_ids(count: int, vocab: int) -> list[int]:
    """Ids that look random and are the same everywhere."""
    digests = (hashlib.sha256(b"tallystick canary %d" % index).digest() for index in range(count))
    return [int.from_bytes(digest[:8], "big") % vocab for digest in digests]


_COLLECTED_BYTES = 8 << 20
"""Layers smaller than that may pile up until Python collects them by itself."""


class Walk:
    """Three sequences on their way through a model."""

    def __init__(self, draft: Manifest, anatomy: Anatomy, store: Store, job: Job, meter: Meter) -> None:
        self._draft, self._anatomy, self._store, self._job, self._meter = draft, anatomy, store, job, meter
        self._files: dict[str, Path] = {}

    def calibrated(self, canary: torch.Tensor) -> Manifest:
        """The draft with its canary and its norms. Goes on where an interrupted walk of the same job stopped."""
        draft, count = self._draft, min(64, self._draft.max_length)
        ids = [canary, torch.tensor(_arithmetic_ids(count, draft.vocab)), torch.full((count,), int(canary[0]))]
        begun = self._job.walk(self._store)
        state: dict[str, Any] = {"layer": 0, "blocks": [], "norms": [], "output": ""}
        rows: dict[str, torch.Tensor] = {}
        if begun is not None:
            state, rows = begun
            self._meter.skip(sum(self._cost(index) for index in range(state["layer"])))
        for index in range(state["layer"], draft.layers):
            self._meter.begin(f"layer {index + 1} of {draft.layers}")
            rows = self._step(index, state, rows, ids)
            self._meter.add(self._cost(index))
            state["layer"] = index + 1
            if self._cost(index) > _COLLECTED_BYTES:
                gc.collect()  # a spliced model holds itself: without this, layers pile up
            self._job.note_walk(state, rows)
        self._meter.end()
        blocks = tuple(Cid.parse(block) for block in state["blocks"])
        norms = tuple((float(low), float(high)) for low, high in state["norms"])
        kept = Canary(tuple(int(token) for token in canary), blocks, Cid.parse(state["output"]))
        return replace(draft, norms=norms, canary=kept)

    def _step(
        self, index: int, state: dict[str, Any], rows: dict[str, torch.Tensor], ids: list[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """One layer: the rows that leave it. Its block, its norms and the model's output go into the state."""
        draft, span = self._draft, Span(index, index + 1)
        model = self._load(span)
        entering = ids if draft.takes_ids(span) else [rows[f"rows.{k}"] for k in range(len(ids))]
        walked = [model.rows_between(self._segment(model, one, rows, k)) for k, one in enumerate(entering)]
        entered, left = [pair[0] for pair in walked], [pair[1] for pair in walked]
        if index == 0:
            state["blocks"].append(self._keep(entered[0]))
            state["norms"].append(_norm_range(entered))
        elif draft.takes_ids(span):  # a decoder begins: what enters it is bounded with the encoder's result
            low, high = _norm_range(entered)
            state["norms"][-1] = (min(low, state["norms"][-1][0]), max(high, state["norms"][-1][1]))
        memory = {name: tensor for name, tensor in rows.items() if name.startswith("memory.")}
        if draft.encoder_layers and span.end == draft.encoder_layers:
            left = [model.forward([self._segment(model, one, rows, k)])[0] for k, one in enumerate(entering)]
            memory = {f"memory.{k}": one for k, one in enumerate(left)}
        if span.end == draft.layers:
            segment = self._segment(model, entering[0], rows, 0)
            segment.wanted = [len(entering[0]) - 1]
            state["output"] = self._keep(model.forward([segment])[0])
        state["blocks"].append(self._keep(left[0]))
        state["norms"].append(_norm_range(left))
        return {**memory, **{f"rows.{k}": one for k, one in enumerate(left)}}

    def _segment(self, model: SpanModel, one: torch.Tensor, rows: dict[str, torch.Tensor], k: int) -> Segment:
        memory = rows.get(f"memory.{k}") if model.span.start >= self._draft.encoder_layers else None
        return Segment(model.new_cache(len(one), memory), 0, one)

    def _load(self, span: Span) -> SpanModel:
        skeleton = build_skeleton(self._draft.config, self._draft.architecture, self._draft.labels)
        try:
            return fill_span(self._draft, span, self._open, skeleton, self._anatomy)
        finally:
            for name in [name for name in self._files if name.startswith("layer.")]:
                self._files.pop(name).unlink(missing_ok=True)

    def _open(self, piece: Piece) -> Path:
        """A piece's file, its bytes checked against its CID by the store."""
        if piece.name not in self._files:
            path = self._job.folder / piece.name
            self._store.read_file(piece.cid, path, piece.bytes)
            self._files[piece.name] = path
        return self._files[piece.name]

    def _cost(self, index: int) -> int:
        """Bytes of weights that a layer's step goes through."""
        return sum(piece.bytes for piece in self._draft.pieces if piece.name == f"layer.{index}")

    def _keep(self, rows: torch.Tensor) -> str:
        if not bool(torch.isfinite(rows).all()):
            raise ManifestError("the model computes NaN or infinity from ordinary text: its weights overflow in fp32")
        return str(self._store.put_block(rows.numpy().astype("<f4").tobytes(), Codec.RAW))


def _norm_range(sequences: list[torch.Tensor]) -> tuple[float, float]:
    """The smallest and largest row norm, with the margin, to six digits."""
    norms = torch.cat([rows.double().norm(dim=1) for rows in sequences])
    low, high = float(norms.min()) / NORM_MARGIN, float(norms.max()) * NORM_MARGIN
    return float(f"{low:.6g}"), float(f"{max(high, 1e-30):.6g}")
