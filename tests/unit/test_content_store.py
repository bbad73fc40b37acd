"""The local store: verified at read, atomic at write, safe among processes."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import resource
from pathlib import Path

import pytest

from tallystick_protocol.content.cid import Cid, Codec
from tallystick_protocol.content.files import locked
from tallystick_protocol.content.store import LocalStore, Store
from tallystick_protocol.content.unixfs import Profile, build_file, file_cid
from tallystick_protocol.errors import BadBlock, BlockMissing, ContentError, ContentTooLarge

SMALL = Profile("small", chunk_bytes=1000, width=8)
CONTENT = bytes(range(256)) * 100
ANY = 1 << 30


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store", profile=SMALL, lock_timeout_s=0.2)


def files_under(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damage(path: Path, offset: int = 0) -> None:
    path.chmod(0o644)
    with path.open("r+b") as opened:
        opened.seek(offset)
        byte = opened.read(1)
        opened.seek(offset)
        opened.write(bytes((byte[0] ^ 1,)))


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 8000, 8001, 25600])
def test_a_file_comes_out_as_it_went_in(store: Store, tmp_path: Path, size: int) -> None:
    (tmp_path / "in").write_bytes(CONTENT[:size])
    cid = store.put_file(tmp_path / "in")
    assert cid == file_cid(io.BytesIO(CONTENT[:size]), SMALL)
    assert store.read_file(cid, tmp_path / "deep" / "out", max_bytes=size) == size
    assert (tmp_path / "deep" / "out").read_bytes() == CONTENT[:size]


def test_every_block_of_a_whole_file_is_served_from_it(store: LocalStore) -> None:
    root = store.put_file(io.BytesIO(CONTENT))
    for block in build_file(io.BytesIO(CONTENT), SMALL):
        assert store.has(block.cid)
        assert store.get_block(block.cid) == block.content
    raw_bytes = (store.root / "files" / str(root)).stat().st_size
    loose_bytes = sum(p.stat().st_size for p in files_under(store.root / "blocks"))
    assert raw_bytes == len(CONTENT)
    assert loose_bytes < len(CONTENT) / 5


def test_progress_ends_at_the_whole(store: LocalStore, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    cid = store.put_file(io.BytesIO(CONTENT))
    store.read_file(cid, tmp_path / "out", ANY, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert seen == sorted(seen)


def test_a_missing_block_names_itself_and_the_store(store: LocalStore) -> None:
    cid = Cid.of_raw(b"nowhere")
    with pytest.raises(BlockMissing) as missing:
        store.get_block(cid)
    assert missing.value.cid == cid
    assert str(store.root) in str(missing.value)


def test_a_damaged_loose_block_is_never_returned(store: LocalStore) -> None:
    cid = store.put_block(b"block", Codec.RAW)
    [path] = files_under(store.root / "blocks")
    damage(path)
    with pytest.raises(BlockMissing):
        store.get_block(cid)
    assert not store.has(cid)
    assert store.get_block(store.put_block(b"block", Codec.RAW)) == b"block"


def test_a_damaged_whole_file_is_noticed_and_mended(store: LocalStore, tmp_path: Path) -> None:
    root = store.put_file(io.BytesIO(CONTENT))
    damage(store.root / "files" / str(root), offset=1500)
    with pytest.raises(BlockMissing):
        store.read_file(root, tmp_path / "out", ANY)
    assert not (tmp_path / "out").exists()
    store.put_block(CONTENT[1000:2000], Codec.RAW)
    store.gather(root, ANY)
    store.read_file(root, tmp_path / "out", ANY)
    assert (tmp_path / "out").read_bytes() == CONTENT


def test_a_whole_file_is_not_linked_when_only_a_copy_of_its_block_is_right(store: LocalStore, tmp_path: Path) -> None:
    root = store.put_file(io.BytesIO(CONTENT))
    damage(store.root / "files" / str(root), offset=1500)
    store.put_block(CONTENT[1000:2000], Codec.RAW)
    store.read_file(root, tmp_path / "out", ANY)
    assert (tmp_path / "out").read_bytes() == CONTENT


def test_loose_blocks_are_gathered_into_a_whole_file(store: LocalStore, tmp_path: Path) -> None:
    *_, root = (block.cid for block in build_file(io.BytesIO(CONTENT), SMALL))
    for block in build_file(io.BytesIO(CONTENT), SMALL):
        store.put_block(block.content, block.cid.codec)
    store.gather(root, ANY)
    assert (store.root / "files" / str(root)).read_bytes() == CONTENT
    assert all(store.has(block.cid) for block in build_file(io.BytesIO(CONTENT), SMALL))


def test_refuses_what_is_no_block(store: LocalStore) -> None:
    with pytest.raises(ContentTooLarge):
        store.put_block(bytes(2 * 1024 * 1024 + 1), Codec.RAW)
    with pytest.raises(BadBlock):
        store.put_block(b"\x0a\x00", Codec.DAG_PB)
    assert files_under(store.root / "blocks") == []


def test_a_file_larger_than_allowed_is_not_written(store: LocalStore, tmp_path: Path) -> None:
    cid = store.put_file(io.BytesIO(CONTENT))
    with pytest.raises(ContentTooLarge):
        store.read_file(cid, tmp_path / "out", max_bytes=len(CONTENT) - 1)
    assert not (tmp_path / "out").exists()


def test_another_process_sees_new_files(store: LocalStore) -> None:
    other = LocalStore(store.root, profile=SMALL)
    assert not other.has(Cid.of_raw(CONTENT[:1000]))
    store.put_file(io.BytesIO(CONTENT))
    assert other.get_block(Cid.of_raw(CONTENT[:1000])) == CONTENT[:1000]


def test_pins_keep_and_the_rest_is_collected(store: LocalStore, tmp_path: Path) -> None:
    kept = store.put_file(io.BytesIO(CONTENT))
    dropped = store.put_file(io.BytesIO(CONTENT[:7000] + b"another end"))
    loose = store.put_block(b"loose", Codec.RAW)
    (store.root / "new" / "left-by-a-crash").write_bytes(b"half")
    store.pin(kept)
    assert store.pins() == (kept,)
    assert store.collect_garbage() > 0
    assert not store.has(loose) and not store.has(dropped)
    assert list((store.root / "new").iterdir()) == []
    assert store.read_file(kept, tmp_path / "out", ANY) == len(CONTENT)
    store.unpin(kept)
    store.unpin(kept)
    store.collect_garbage()
    assert files_under(store.root) == [store.root / "lock"]


def test_what_is_dropped_goes_but_for_what_others_hold_and_nothing_else_goes(
    store: LocalStore, tmp_path: Path
) -> None:
    kept = store.put_file(io.BytesIO(CONTENT))
    dropped = store.put_file(io.BytesIO(CONTENT[:7000] + b"another end"))
    single = store.put_file(io.BytesIO(b"one block"))
    under_way = store.put_block(b"loose", Codec.RAW)
    for root in (kept, dropped, single):
        store.pin(root)
    assert store.drop(single) == len(b"one block") and not store.has(single)
    assert store.drop(dropped) > 0 and not store.has(dropped)
    assert store.pins() == (kept,) and store.has(under_way)
    assert store.read_file(kept, tmp_path / "out", ANY) == len(CONTENT)
    again = store.put_file(io.BytesIO(CONTENT[:7000] + b"another end"))
    assert store.read_file(again, tmp_path / "out", ANY) == 7000 + len(b"another end")
    with pytest.raises(BlockMissing):
        store.drop(Cid(Codec.DAG_PB, Cid.of_raw(b"never here").digest))


def test_a_block_pinned_by_itself_outlives_the_file_it_lay_in(store: LocalStore) -> None:
    leaf = Cid.of_raw(CONTENT[:1000])
    root = store.put_file(io.BytesIO(CONTENT))
    store.pin(leaf)
    store.collect_garbage()
    assert store.get_block(leaf) == CONTENT[:1000]
    assert not store.has(root)


def test_an_incomplete_file_cannot_be_pinned(store: LocalStore) -> None:
    *blocks, root = build_file(io.BytesIO(CONTENT), SMALL)
    for block in [*blocks[1:], root]:
        store.put_block(block.content, block.cid.codec)
    with pytest.raises(BlockMissing, match=str(blocks[0].cid)):
        store.pin(root.cid)
    assert store.pins() == ()


def test_garbage_is_not_collected_under_a_writer(store: LocalStore) -> None:
    with store.in_use(), pytest.raises(ContentError, match="locked by another process"):
        store.collect_garbage()


def test_names_come_from_cids_alone(store: LocalStore) -> None:
    (store.root / "pins" / "..%2f..%2fetc").write_bytes(b"")
    (store.root / "files" / "not-a-cid").write_bytes(b"")
    assert store.pins() == ()
    store.collect_garbage()
    assert (store.root / "files" / "not-a-cid").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_and_leaves_nothing(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fired = 0

    def full(_handle: int) -> None:
        nonlocal fired
        fired += 1
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ContentError, match="no space left"):
        store.put_block(b"block", Codec.RAW)
    with pytest.raises(ContentError, match="no space left"):
        store.put_file(io.BytesIO(CONTENT))
    assert fired == 2
    assert files_under(store.root) == [store.root / "lock"]


def test_a_write_that_the_kernel_refuses_half_way(store: LocalStore) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ContentError, match="no space left"):
            store.put_file(io.BytesIO(CONTENT))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files_under(store.root / "files") == files_under(store.root / "new") == []


def test_a_source_that_fails_half_way_leaves_no_file(store: LocalStore) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            part = super().read(size)
            if not part:
                raise ConnectionResetError("cable")
            return part

    with pytest.raises(ConnectionResetError):
        store.put_file(Broken(CONTENT[:24_000]))
    assert files_under(store.root / "files") == files_under(store.root / "new") == []


def _churn(root: Path, seed: int) -> None:
    store = LocalStore(root, profile=SMALL)
    for turn in range(8):
        content = bytes((seed + turn + index) % 251 for index in range(12_000))
        with store.in_use():
            cid = store.put_file(io.BytesIO(content))
            assert store.read_file(cid, root.parent / f"out-{seed}", ANY) == len(content)
        store.collect_garbage()


def test_processes_that_write_and_collect_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_churn, args=(tmp_path / "store", seed)) for seed in (0, 1)]
    for worker in workers:
        worker.start()
    _churn(tmp_path / "store", 2)
    for worker in workers:
        worker.join(20)
        assert worker.exitcode == 0


def test_a_lock_is_given_up_after_its_deadline(tmp_path: Path) -> None:
    with locked(tmp_path / "lock", shared=False, timeout_s=1):
        with pytest.raises(ContentError, match=r"0\.05 s"):
            with locked(tmp_path / "lock", shared=True, timeout_s=0.05):
                pass
