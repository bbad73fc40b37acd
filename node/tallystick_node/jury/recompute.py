"""Recomputing an accused window from its evidence: a process of its own, with the lowest priority, that may be killed.

    python -m tallystick_node.jury.recompute JOB.json

Its last line is a `Finding`. It reads local files alone; nothing of its evidence has been looked at by torch before it
was checked here.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tallystick_model.kept_classes import KeptClasses
from tallystick_model.loader import load_span
from tallystick_model.numeric_class import STOCK
from tallystick_model.span import Execution, SpanModel
from tallystick_node.config import NodeConfig, process_environment
from tallystick_node.jury.judging import Finding, needs_spread
from tallystick_node.jury.measuring import INFINITE, dense_error, logits_error, rows_error
from tallystick_node.planning.measure import check_memory
from tallystick_node.session.rows import RowFormat, embedded, needed_ids
from tallystick_protocol.errors import BadEvidence, CorruptResult, ProtocolError, TallystickError
from tallystick_protocol.evidence.bundle import Bundle
from tallystick_protocol.evidence.checking import Evidence, check_model, read_evidence
from tallystick_protocol.evidence.recomputing import Job
from tallystick_protocol.frames import DType, Kind, rows_frame
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.receipts import leaf, merkle_root
from tallystick_protocol.sampling import parse_top_k
from tallystick_protocol.sketching.thresholds import logits_thresholds, thresholds
from tallystick_protocol.types import Digest
from tallystick_protocol.wire import DTYPES, decode

CHUNKS = (96, 64)
"""Rows of a forward, and of the one that a juror doubts itself with: canonical rows are the same bits either way."""


def examine(job: Job) -> Finding:
    """Read, load, compute, compare. Every expected failure is a finding, too."""
    began = time.monotonic()
    try:
        evidence = read_evidence(job.domain, Path(job.evidence).read_bytes(), Digest(bytes.fromhex(job.receipt)))
        manifest = Manifest.from_bytes(Path(job.manifest).read_bytes())
        check_model(evidence, manifest)
        found = _examine(job, evidence, manifest)
    except BadEvidence as error:
        return Finding("unreadable", error.message)
    except TallystickError as error:
        return Finding("unable", error.message)
    except (RuntimeError, MemoryError, ValueError) as error:  # which torch raises for what it cannot do or hold
        return Finding("unable", f"{type(error).__name__}: {str(error)[:200]}")
    return replace(found, seconds=round(time.monotonic() - began, 3))


def _examine(job: Job, evidence: Evidence, manifest: Manifest) -> Finding:
    accused, bundle = evidence.accused, evidence.bundle
    check_memory(manifest, accused.span, job.memory)
    classes = Path(job.class_cache) if job.class_cache else NodeConfig.model_fields["class_cache"].default.expanduser()
    own = KeptClasses(classes, process_environment()).find(manifest).numeric_class
    same = own == accused.numeric_class and own != STOCK
    model = _load(job, manifest, evidence, "canonical" if own != STOCK else "stock")
    work = Work(model, evidence, manifest)
    result = work.run(CHUNKS[0])
    root = merkle_root([leaf(row) for row in work.outputs(result)])
    equal = root == accused.output
    if not equal and same and merkle_root([leaf(row) for row in work.outputs(work.run(CHUNKS[1]))]) != root:
        return Finding("unable", "this machine computes the same rows to different bits")
    if work.has_logits:  # their error is told as a share of the tolerance
        clear, guilty = 1.0, logits_thresholds(manifest).guilty
    else:
        limits = thresholds(manifest, accused.span)
        clear, guilty = limits.clear, limits.guilty
    error = 0.0 if equal else None
    if not equal and bundle.outputs is not None:
        error = work.error(bundle.outputs, result)
    found = Finding("", "", same, equal, root.hex(), error, clear, guilty)
    if needs_spread(found):
        other: Execution = "stock" if model.execution == "canonical" else "canonical"
        second = Work(_load(job, manifest, evidence, other), evidence, manifest)
        rows = work.outputs(second.run(CHUNKS[0]))
        found = replace(found, spread=work.error([row for row in rows if row], result))
    return found


def _load(job: Job, manifest: Manifest, evidence: Evidence, execution: Execution) -> SpanModel:
    def open_piece(piece: Any) -> Path:
        return Path(job.pieces[str(piece.cid)])

    return load_span(manifest, evidence.accused.span, open_piece, execution=execution, threads=job.threads)


class Work:
    """One span over one bundle's rows."""

    def __init__(self, model: SpanModel, evidence: Evidence, manifest: Manifest) -> None:
        self._model, self._manifest = model, manifest
        self._bundle, self._accused = evidence.bundle, evidence.accused
        self._rows = RowFormat(manifest, self._accused.span, self._bundle.top_k, self._bundle.wire)
        self._want = self._bundle.want[self._accused.first : self._accused.last]
        self.has_logits = manifest.output_of(self._accused.span) == "logits"
        self._inputs, self._types = _parsed(self._rows, self._bundle)

    def run(self, chunk: int) -> Any:
        """What leaves the span at the accused window: hidden rows of every position, else the wanted ones' results."""
        cache, parts = self._new_cache(), []
        for first, last in self._chunks(chunk):
            want = self._want if first == self._accused.first else [False] * (last - first)
            segment = self._rows.segment(cache, first, self._inputs[first:last], want, self._types)
            done = self._model.forward([segment])[0]
            if first >= self._accused.first:
                parts.append(done)
        return torch.cat(parts)

    def outputs(self, result: Any) -> list[bytes]:
        """Its rows, as a node signs them; empty where there is none."""
        try:
            return self._rows.outputs(result, self._want)
        except CorruptResult as error:
            raise RuntimeError(error.message) from None  # what no honest node would have signed: nothing to compare

    def error(self, theirs: Any, result: Any) -> float:
        """Of output rows (bytes, those that are not empty) against what was recomputed."""
        if self.has_logits:
            return self._logits_error(theirs, result)
        own = b"".join(row for row in self.outputs(result) if row)
        if self._rows.is_last:
            y, ours = (_floats(rows, len(theirs)) for rows in (b"".join(theirs), own))
            return rows_error(y, ours, np.zeros_like(ours))
        width, wire = self._manifest.width, self._bundle.wire
        y, ours = (decode(bytearray(rows), wire, width) for rows in (b"".join(theirs), own))
        return rows_error(y, ours, self._entered())

    def _logits_error(self, theirs: Any, result: Any) -> float:
        own, tolerance = result.numpy(), logits_thresholds(self._manifest)
        if self._rows.result_dtype is DType.F32:
            return dense_error(_floats(b"".join(theirs), len(theirs)), own, tolerance)
        try:
            pairs = [parse_top_k(row) for row in theirs]
        except CorruptResult:
            return INFINITE
        ids, values = (np.stack([pair[part] for pair in pairs]) for part in (0, 1))
        return logits_error(ids, values, own, tolerance)

    def _entered(self) -> Any:
        """The hidden rows that entered the first layer at the accused window."""
        window = self._accused.positions
        if not self._rows.is_first:
            rows = b"".join(self._inputs[window.first : window.last])
            return decode(bytearray(rows), self._bundle.wire, self._manifest.width)
        at = needed_ids(self._model, window)
        return embedded(self._model, self._inputs[at.first : at.last], at, self._types)[-len(window) :].numpy()

    def _chunks(self, size: int) -> Iterator[tuple[int, int]]:
        """The history in pieces, then the accused window alone."""
        for first in range(0, self._accused.first, size):
            yield first, min(first + size, self._accused.first)
        yield self._accused.first, self._accused.last

    def _new_cache(self) -> Any:
        memory = None
        if self._bundle.memory:
            states = np.frombuffer(b"".join(self._bundle.memory), dtype="<f4").reshape(-1, self._manifest.width)
            memory = torch.from_numpy(states.copy())
        try:
            return self._model.new_cache(self._bundle.num_positions, memory)
        except ProtocolError as error:
            raise BadEvidence(error.message) from None


def _parsed(rows: RowFormat, bundle: Bundle) -> tuple[list[bytes], list[int]]:
    """Input rows and token types, held to what a node takes. Raises BadEvidence: no honest one would have signed."""
    dtype = DType.IDS if rows.is_first else DTYPES[bundle.wire]
    body = {"types": bundle.token_types} if bundle.token_types else {}
    frame = rows_frame(Kind.STEP, dtype, list(bundle.inputs), 0, body)
    try:
        return rows.parse(frame), rows.token_types(frame)
    except ProtocolError as error:
        raise BadEvidence(error.message) from None


def _floats(rows: bytes, count: int) -> Any:
    return np.frombuffer(rows, dtype="<f4").reshape(count, -1)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def main(path: str) -> int:
    os.nice(19)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    sys.stdout.write(examine(Job(**json.loads(Path(path).read_text()))).to_json() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
