"""Building file DAGs: our CIDs are Kubo's and js-ipfs's."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from Crypto.Cipher import ChaCha20

from tallystick_protocol.content.cid import Cid, Codec
from tallystick_protocol.content.dag import walk
from tallystick_protocol.content.dag_pb import parse_file_node
from tallystick_protocol.content.unixfs import UNIXFS_256K, UNIXFS_V1_2025, Profile, build_file, file_cid
from tallystick_protocol.errors import BadBlock

VECTORS = Path(__file__).parents[1] / "vectors"
FILES: list[dict[str, Any]] = json.loads((VECTORS / "cids.json").read_text())["files"]
NODES: dict[str, list[dict[str, Any]]] = json.loads((VECTORS / "dag_pb.json").read_text())
PROFILES = {profile.name: profile for profile in (UNIXFS_V1_2025, UNIXFS_256K)}
LARGE_BYTES = 1 << 30


class Keystream:
    """`size` bytes of the vectors' keystream, made as they are read."""

    def __init__(self, seed: str, size: int) -> None:
        self._cipher = ChaCha20.new(key=hashlib.sha256(seed.encode()).digest(), nonce=bytes(12))
        self._left = size

    def read(self, size: int, /) -> bytes:
        taken = min(size, self._left)
        self._left -= taken
        return self._cipher.encrypt(bytes(taken))


class Dribble(io.BytesIO):
    """Returns at most 7 bytes per read, as a socket may."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(min(7, size) if size is not None and size >= 0 else 7)


def _vector(case: dict[str, Any]) -> Any:
    slow = [pytest.mark.nightly] if case["size"] >= LARGE_BYTES else []
    return pytest.param(case, marks=slow, id=f"{case['profile']}-{case['size']}")


@pytest.mark.parametrize("case", [_vector(case) for case in FILES])
def test_file_cids_equal_the_vectors(case: dict[str, Any]) -> None:
    source = io.BytesIO(case["text"].encode()) if "text" in case else Keystream(case["seed"], case["size"])
    assert str(file_cid(source, PROFILES[case["profile"]])) == case["cid"]


@pytest.mark.parametrize(
    ("num_chunks", "num_nodes"), [(0, 0), (1, 0), (2, 1), (1024, 1), (1025, 3), (2048, 3), (2049, 4)]
)
def test_a_node_is_added_only_when_the_width_is_exceeded(num_chunks: int, num_nodes: int) -> None:
    content = b"".join(index.to_bytes(4, "big") for index in range(num_chunks))
    blocks = list(build_file(io.BytesIO(content), Profile("narrow", chunk_bytes=4, width=1024)))
    kinds = [block.cid.codec for block in blocks]
    assert kinds.count(Codec.DAG_PB) == num_nodes
    assert kinds.count(Codec.RAW) == max(1, num_chunks)
    by_cid = {block.cid: block.content for block in blocks}
    visits = walk(blocks[-1].cid, by_cid.__getitem__, max_bytes=1 << 30)
    assert b"".join(visit.content for visit in visits) == content


def test_all_leaves_lie_equally_deep() -> None:
    content = bytes(range(29))
    blocks = {block.cid: block.content for block in build_file(io.BytesIO(content), Profile("thin", 1, 3))}
    *_, root = blocks
    depths = {visit.branch.depth for visit in walk(root, blocks.__getitem__, 100) if visit.content}
    assert depths == {4}


def test_short_reads_change_nothing() -> None:
    content = bytes(range(256)) * 5
    profile = Profile("narrow", 100, 4)
    assert file_cid(Dribble(content), profile) == file_cid(io.BytesIO(content), profile)


@pytest.mark.parametrize("case", NODES["valid"], ids=lambda case: case["name"])
def test_reads_valid_file_nodes(case: dict[str, Any]) -> None:
    block = bytes.fromhex(case["hex"])
    node = parse_file_node(block)
    assert (len(node.links), node.size_bytes) == (case["links"], case["size"])
    assert str(Cid.of(block, Codec.DAG_PB)) == case["cid"]


@pytest.mark.parametrize("case", NODES["invalid"], ids=lambda case: case["name"])
def test_refuses_invalid_file_nodes_and_says_why(case: dict[str, Any]) -> None:
    with pytest.raises(BadBlock) as refused:
        parse_file_node(bytes.fromhex(case["hex"]))
    assert case["says"] in str(refused.value)


def test_refuses_a_block_beyond_two_mebibytes() -> None:
    with pytest.raises(BadBlock, match="2097153 bytes"):
        parse_file_node(bytes(2 * 1024 * 1024 + 1))
