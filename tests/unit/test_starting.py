"""Pieces are packed while others are hashed: each only after all its bytes were checked, and nothing hangs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness import checkpoints
from harness.checkpoints import Published, Session, published
from tallystick.publishing import serve_content
from tallystick_model.loader import load_span
from tallystick_model.span import SpanModel
from tallystick_node.pieces import Pieces
from tallystick_node.starting import Durations, fetch_and_load
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.errors import BlockMissing, ManifestError
from tallystick_protocol.manifest import Piece


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Published:
    root = tmp_path_factory.mktemp("starting")
    torch.set_num_threads(1)
    made = published(checkpoints.llama(root / "checkpoint", num_hidden_layers=2), root)
    files = [piece.cid for piece in made.manifest.pieces] + [file.cid for file in made.manifest.tokenizer.values()]
    for cid in (*files, *made.manifest.canary.rows, made.manifest.canary.output):
        made.store.pin(cid)  # what is served is what is pinned
    return made


async def test_a_span_that_is_packed_as_it_arrives_is_the_same(served: Published, tmp_path: Path) -> None:
    whole, took = served.manifest.whole, Durations()
    runner, url = await serve_content(served.store, "127.0.0.1", 0)
    try:
        model = await fetch_and_load(
            Pieces(LocalStore(tmp_path / "store"), tmp_path / "pieces", [url]), served.manifest, whole,
            lambda open_piece: load_span(served.manifest, whole, open_piece), took,
        )  # fmt: skip
    finally:
        await runner.cleanup()
    ids = torch.arange(20)
    assert torch.equal(Session([model]).step(ids), Session([served.load(whole)]).step(ids))
    assert sorted(took.steps) == ["fetching and hashing", "reading, checking and packing beside it"]


async def test_a_piece_that_nobody_has_ends_the_loading_that_waits_for_it(served: Published, tmp_path: Path) -> None:
    whole = served.manifest.whole
    with pytest.raises(BlockMissing, match="nobody asked holds"):
        await fetch_and_load(
            Pieces(LocalStore(tmp_path / "store"), tmp_path / "pieces", []), served.manifest, whole,
            lambda open_piece: load_span(served.manifest, whole, open_piece), Durations(),
        )  # fmt: skip


async def test_loading_that_fails_ends_the_fetching(served: Published, tmp_path: Path) -> None:
    def refuse(open_piece: Callable[[Piece], Path]) -> SpanModel:
        assert open_piece(served.manifest.pieces[0]).exists()
        raise ManifestError("not what the manifest says")

    pieces = Pieces(served.store, tmp_path / "pieces", [])
    with pytest.raises(ManifestError, match="not what the manifest says"):
        await fetch_and_load(pieces, served.manifest, served.manifest.whole, refuse, Durations())
