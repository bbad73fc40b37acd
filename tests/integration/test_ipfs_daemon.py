"""The daemon store and our CIDs against a real js-ipfs daemon."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ipfshttpclient
import pytest
from Crypto.Cipher import ChaCha20

from harness import ipfs_daemon
from tallystick_protocol.content.cid import Cid, Codec
from tallystick_protocol.content.ipfs import DaemonStore
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.content.unixfs import UNIXFS_256K, UNIXFS_V1_2025, Profile
from tallystick_protocol.errors import BadBlock, BlockMissing, SourceFailed

FILES: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "vectors" / "cids.json").read_text())["files"]
PROFILES = {profile.name: profile for profile in (UNIXFS_V1_2025, UNIXFS_256K)}
PROGRAM = ipfs_daemon.find_program()
CONTENT = b"".join(index.to_bytes(4, "big") for index in range(700_000))
# js-ipfs cannot be told a width: beyond 174 chunks only the other profile is its own.
ADDABLE = [
    case for case in FILES if case["size"] <= 174 * PROFILES[case["profile"]].chunk_bytes or "256k" in case["profile"]
]

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="js-ipfs is not installed: run scripts/install --ipfs")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ipfs_daemon.Daemon]:
    assert PROGRAM is not None
    with ipfs_daemon.running(PROGRAM, tmp_path_factory.mktemp("ipfs") / "repo") as running:
        yield running


@pytest.fixture
def store(daemon: ipfs_daemon.Daemon) -> DaemonStore:
    return DaemonStore(daemon.addr, deadline_s=1.5, glance_s=0.5)


@pytest.fixture
def client(daemon: ipfs_daemon.Daemon) -> Any:
    return ipfshttpclient.Client(daemon.addr)


def content_of(case: dict[str, Any]) -> bytes:
    if "text" in case:
        return bytes(case["text"].encode())
    cipher = ChaCha20.new(key=hashlib.sha256(case["seed"].encode()).digest(), nonce=bytes(12))
    return bytes(cipher.encrypt(bytes(case["size"])))


def test_pins_come_and_go_and_garbage_is_collected(store: DaemonStore, client: Any) -> None:
    cid = store.put_file(io.BytesIO(b"kept " * 1000))
    assert cid in store.pins()
    client.repo.gc()
    assert store.has(cid)
    store.unpin(cid)
    store.unpin(cid)
    assert cid not in store.pins()
    client.repo.gc()
    assert not store.has(cid)


@pytest.mark.parametrize("case", ADDABLE, ids=lambda case: f"{case['profile']}-{case['size']}")
def test_the_daemons_own_add_gives_our_cids(client: Any, case: dict[str, Any]) -> None:
    added = client.add(
        io.BytesIO(content_of(case)),
        chunker=f"size-{PROFILES[case['profile']].chunk_bytes}",
        raw_leaves=True,
        cid_version=1,
        pin=False,
        timeout=60,
    )
    assert str(Cid.parse(added["Hash"])) == case["cid"]


def test_a_file_comes_out_as_it_went_in(store: DaemonStore, client: Any, tmp_path: Path) -> None:
    cid = store.put_file(io.BytesIO(CONTENT))
    assert cid == LocalStore(tmp_path / "local").put_file(io.BytesIO(CONTENT))
    assert store.has(cid)
    assert store.read_file(cid, tmp_path / "out", len(CONTENT)) == len(CONTENT)
    assert (tmp_path / "out").read_bytes() == CONTENT
    assert client.cat(str(cid)) == CONTENT


def test_a_tree_wider_than_the_daemon_builds_is_kept(
    daemon: ipfs_daemon.Daemon, store: DaemonStore, tmp_path: Path
) -> None:
    thin = DaemonStore(daemon.addr, profile=Profile("thin", chunk_bytes=1000, width=1024))
    content = CONTENT[:300_000]
    cid = thin.put_file(io.BytesIO(content))
    assert store.read_file(cid, tmp_path / "out", 1 << 30) == len(content)
    assert (tmp_path / "out").read_bytes() == content


def test_what_nobody_has_is_missing_within_our_deadline(store: DaemonStore) -> None:
    nowhere = Cid.of_raw(b"nobody holds this")
    for call in (store.get_block, store.pin):
        started = time.monotonic()
        with pytest.raises(BlockMissing, match=str(nowhere)):
            call(nowhere)
        assert time.monotonic() - started < 4
    assert not store.has(nowhere)


def test_a_directory_is_refused_where_a_file_is_expected(store: DaemonStore, client: Any, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_bytes(b"a")
    added = client.add(str(tmp_path / "folder"), recursive=True, cid_version=1, raw_leaves=True)
    folder = next(Cid.parse(entry["Hash"]) for entry in added if entry["Name"] == "folder")
    with pytest.raises(BadBlock, match="a directory"):
        store.read_file(folder, tmp_path / "out", 1 << 30)
    assert not (tmp_path / "out").exists()


def test_files_of_kubos_old_defaults_are_read_too(store: DaemonStore, client: Any, tmp_path: Path) -> None:
    added = client.add(io.BytesIO(CONTENT), raw_leaves=False, cid_version=0)
    assert added["Hash"].startswith("Qm")
    store.read_file(Cid.parse(added["Hash"]), tmp_path / "out", len(CONTENT))
    assert (tmp_path / "out").read_bytes() == CONTENT


def test_an_upload_survives_a_restart_of_the_daemon(daemon: ipfs_daemon.Daemon, store: DaemonStore) -> None:
    pauses = 0

    def restart(_: float) -> None:
        nonlocal pauses
        pauses += 1
        daemon.start()

    class Cutting(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() == 1 << 20:
                daemon.stop()
            return super().read(size)

    patient = DaemonStore(daemon.addr, deadline_s=10, pause=restart)
    cid = patient.put_file(Cutting(CONTENT))
    assert pauses == 1
    assert cid in store.pins()


def test_a_stopped_daemon_is_named_with_the_next_command(daemon: ipfs_daemon.Daemon) -> None:
    daemon.stop()
    try:
        with pytest.raises(SourceFailed, match="start it with"):
            DaemonStore(daemon.addr, pause=lambda _: None).put_block(b"x", Codec.RAW)
    finally:
        daemon.start()
