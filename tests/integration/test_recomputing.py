"""The client computes a window again, in a process of its own, on a published model's pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness import checkpoints, samples
from harness.checkpoints import Published, published
from harness.claims import claim
from tallystick import recomputing
from tallystick.recomputing import Recomputer
from tallystick_model.kept_classes import KeptClasses
from tallystick_model.loader import load_span
from tallystick_node.config import process_environment
from tallystick_node.session.rows import RowFormat
from tallystick_protocol.errors import NoAuditor
from tallystick_protocol.evidence.checking import read_evidence
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.receipts import Context, Receipt
from tallystick_protocol.types import Span
from tallystick_protocol.wire import encode

SPAN, POSITIONS, TOP_K = Span(1, 3), 70, 8


@dataclass(slots=True)
class Library:
    """A network as far as the client needs it here. asked: which pieces were fetched."""

    made: Published
    described: Manifest
    folder: Path
    asked: list[str] = field(default_factory=list)

    async def manifest(self, _: Any) -> Manifest:
        return self.described

    async def piece(self, _: Any, name: str) -> Path:
        self.asked.append(name)
        return self.made.open_piece(next(piece for piece in self.described.pieces if piece.name == name))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    folder = tmp_path_factory.mktemp("library")
    made = published(checkpoints.llama(folder / "checkpoint"), folder)
    return Library(made, replace(made.manifest, norms=((0.0, 1e9),) * (made.manifest.layers + 1)), folder)


def claimed(library: Library, spoil: Callable[[Any], Any] = lambda rows: rows, **changes: Any) -> tuple[bytes, Receipt]:
    """Evidence about a node's last window. spoil: what it makes of its results."""
    torch.set_num_threads(1)
    model = load_span(library.described, SPAN, library.made.open_piece)
    rows = RowFormat(library.described, SPAN, TOP_K, "f32")
    drawn = np.random.default_rng(1).normal(size=(POSITIONS, library.described.width)).astype(np.float32)
    inputs, want = encode(drawn, "f32"), [False] * POSITIONS
    result = model.forward([rows.segment(model.new_cache(POSITIONS), 0, inputs, want)])[0]
    outputs = rows.outputs(spoil(result), want)
    own = KeptClasses(library.folder / "classes", process_environment()).find(library.described).numeric_class
    receipt = replace(samples.receipt(start=SPAN.start, end=SPAN.end, numeric_class=own), **changes)
    context = Context(library.described.numerics, "f32", TOP_K, ())
    data = claim(receipt, inputs, outputs, want, context=context, key=samples.key("hot"), between=True).encode()
    return data, read_evidence(samples.STAKING, data).accused


def recomputer(library: Library, max_bytes: int = 1 << 30) -> Recomputer:
    network, record = library, None
    return Recomputer(network, record, samples.STAKING, max_bytes, library.folder / "classes")  # type: ignore[arg-type]


async def test_a_false_claim_is_told_from_the_true_one(library: Library) -> None:
    _, true = claimed(library)
    evidence, false = claimed(library, lambda rows: rows * (1 + 1e-3))
    assert recomputing.can_recompute()
    assert await recomputer(library).root(evidence, false) == true.output != false.output


@pytest.mark.nightly
async def test_a_machine_of_another_class_says_nothing(library: Library) -> None:
    evidence, receipt = claimed(library, numeric_class=samples.digest("another class"))
    with pytest.raises(NoAuditor, match="another class"):
        await recomputer(library).root(evidence, receipt)


async def test_no_more_is_fetched_than_the_settings_allow(library: Library) -> None:
    evidence, receipt = claimed(library)
    size = sum(piece.bytes for piece in library.described.span_pieces(SPAN))
    library.asked.clear()
    with pytest.raises(NoAuditor, match=f"{size} bytes, {size - 1} may be fetched"):
        await recomputer(library, size - 1).root(evidence, receipt)
    assert not library.asked


async def test_what_takes_too_long_is_given_up(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    evidence, receipt = claimed(library)
    monkeypatch.setattr(recomputing, "RECOMPUTE_S", 0.05)
    with pytest.raises(NoAuditor, match="too long"):
        await recomputer(library).root(evidence, receipt)


@pytest.mark.nightly
async def test_evidence_about_another_receipt_is_refused(library: Library) -> None:
    evidence, receipt = claimed(library)
    with pytest.raises(NoAuditor, match="another receipt"):
        await recomputer(library).root(evidence, replace(receipt, revision=7))
