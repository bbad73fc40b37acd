"""Before a span is loaded: disk, memory, bits that changed on disk, a store that nodes share, speed."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import pytest
import torch

from harness import checkpoints
from harness.checkpoints import Published, published
from tallystick.publishing import serve_content
from tallystick_model.memory import all_finite, largest_piece_bytes, layer_bytes, span_bytes
from tallystick_model.speed import layer_seconds
from tallystick_node.pieces import Pieces
from tallystick_node.planning import measure
from tallystick_node.planning.measure import check_disk, check_memory, free_memory_bytes, machine_for
from tallystick_node.planning.survey import MAX_CLAIM, Server, supply_of
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.errors import BlockMissing, ConfigError
from tallystick_protocol.types import Address, Span

SPAN = Span(1, 3)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Published:
    root = tmp_path_factory.mktemp("loading")
    torch.set_num_threads(1)
    made = published(checkpoints.llama(root / "checkpoint", tie_word_embeddings=True), root)
    canary = made.manifest.canary
    for cid in (*(piece.cid for piece in made.manifest.pieces), *canary.rows, canary.output):
        made.store.pin(cid)
    return made


async def fetched(served: Published, store: LocalStore, folder: Path) -> Pieces:
    runner, url = await serve_content(served.store, "127.0.0.1", 0)
    try:
        pieces = Pieces(store, folder, [url])
        await pieces.fetch(served.manifest, SPAN)
    finally:
        await runner.cleanup()
    return pieces


def damage(path: Path) -> None:
    """Flip one bit, as a disk does it: without asking for permission to write."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(content)


async def test_a_bit_that_changed_on_disk_after_it_was_checked_is_noticed_and_fetched_again(
    served: Published, tmp_path: Path
) -> None:
    pieces = await fetched(served, LocalStore(tmp_path / "store"), tmp_path / "pieces")
    piece = served.manifest.span_pieces(SPAN)[0]
    sound = pieces.path(piece).read_bytes()
    copies = [path for path in tmp_path.rglob(str(piece.cid)) if path.parent.name != "pins"]
    assert copies
    for path in copies:
        damage(path)
    alone = Pieces(LocalStore(tmp_path / "store"), tmp_path / "pieces", [])
    with pytest.raises(BlockMissing):
        await alone.fetch(served.manifest, SPAN)
    again = await fetched(served, LocalStore(tmp_path / "store"), tmp_path / "pieces")
    assert again.path(piece).read_bytes() == sound


async def test_two_nodes_may_fetch_into_one_store_at_once(served: Published, tmp_path: Path) -> None:
    stores = [LocalStore(tmp_path / "shared") for _ in range(2)]
    both = await asyncio.gather(*(fetched(served, store, tmp_path / str(n)) for n, store in enumerate(stores)))
    for pieces in both:
        for piece in served.manifest.span_pieces(SPAN):
            assert pieces.path(piece).stat().st_size == piece.bytes
            served.store.read_file(piece.cid, tmp_path / "expected", piece.bytes)
            assert pieces.path(piece).read_bytes() == (tmp_path / "expected").read_bytes()


async def test_pieces_of_another_span_are_dropped_and_the_own_ones_kept(served: Published, tmp_path: Path) -> None:
    pieces = await fetched(served, LocalStore(tmp_path / "store"), tmp_path / "pieces")
    first, second = served.manifest.span_pieces(SPAN)[:2]
    pieces.drop(served.manifest, Span(2, 3))
    held = LocalStore(tmp_path / "store")
    assert not held.has(first.cid) and not pieces.path(first).exists()
    assert held.has(second.cid) and pieces.path(second).exists()


async def test_a_model_larger_than_the_disk_is_refused_before_anything_is_fetched(
    served: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    store = LocalStore(tmp_path / "store")
    with pytest.raises(ConfigError, match=r"are missing; nothing was fetched"):
        await Pieces(store, tmp_path / "pieces", ["http://127.0.0.1:9"]).fetch(served.manifest, SPAN)
    assert not [path for path in store.root.rglob("*") if path.is_file()]


def test_a_span_larger_than_memory_is_refused_with_what_is_missing(served: Published) -> None:
    with pytest.raises(ConfigError, match=r"take .* MB of memory .* are missing"):
        check_memory(served.manifest, SPAN, 1000)
    check_memory(served.manifest, SPAN, 0)


def test_enough_disk_is_no_error(tmp_path: Path) -> None:
    check_disk(tmp_path, 1, 1)


def test_the_memory_of_layers_is_that_of_their_tensors(served: Published) -> None:
    manifest = served.manifest
    values = {
        piece.name: sum(math.prod(spec.shape) for spec in piece.tensors.values()) * 4 for piece in manifest.pieces
    }
    sizes = layer_bytes(manifest)
    assert sizes[1:3] == (values["layer.1"], values["layer.2"])
    assert sizes[0] == values["layer.0"] + values["embed"] + values.get("shared", 0)
    assert sizes[3] == values["layer.3"] + values["head"] + values["embed"], "a tied head needs the embedding, too"
    assert span_bytes(manifest, Span(0, 4)) == sum(sizes)
    assert largest_piece_bytes(manifest, SPAN) == max(values["layer.1"], values["layer.2"])


def test_a_machine_is_measured(served: Published) -> None:
    seconds = layer_seconds(served.manifest)
    assert len(seconds) == 4 and all(0 < one < 1 for one in seconds)
    assert seconds[3] > seconds[1] == seconds[2], "the head is read, too"
    machine = machine_for(served.manifest, 10_000_000, 1_000_000)
    assert machine.memory_bytes == 9_000_000 - largest_piece_bytes(served.manifest, Span(0, 4))
    assert free_memory_bytes() > 1 << 20


def test_a_node_that_claims_to_be_very_fast_counts_for_a_few_times_the_median() -> None:
    def server(name: str, span: Span, rate: float | None) -> Server:
        return Server(Address(name), span, rate)

    honest = [server("a", Span(0, 2), 10.0), server("b", Span(2, 4), 10.0)]
    supply = supply_of([*honest, server("c", Span(0, 2), 1e12)], lambda _: 1.0)
    assert supply == {Span(0, 2): 10.0 + MAX_CLAIM * 10.0, Span(2, 4): 10.0}
    assert supply_of([server("d", Span(0, 1), None)], lambda _: 3.0) == {Span(0, 1): 3.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_found_anywhere(value: float, dtype: torch.dtype) -> None:
    for place in (0, 500, 999):
        tensor = torch.randn(1000).to(dtype)
        assert all_finite(tensor)
        tensor[place] = value
        assert not all_finite(tensor)
    assert all_finite(torch.empty(0))
