"""Reading DAGs that lie about their size, their shape or their children."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from tallystick_protocol.content.cid import Cid, Codec
from tallystick_protocol.content.dag import MAX_DEPTH, walk, write_file
from tallystick_protocol.content.dag_pb import FileNode, Link
from tallystick_protocol.content.unixfs import Profile, build_file
from tallystick_protocol.errors import BadBlock, BlockMissing, ContentTooLarge

LEAF = b"leaf"


class Blocks(dict[Cid, bytes]):
    """Blocks in memory."""

    def raw(self, content: bytes) -> Cid:
        cid = Cid.of_raw(content)
        self[cid] = content
        return cid

    def node(self, *links: Link) -> Cid:
        block = FileNode(links).encode()
        cid = Cid.of(block, Codec.DAG_PB)
        self[cid] = block
        return cid

    def link(self, cid: Cid, size: int, below: int = 0) -> Link:
        return Link(cid, size, len(self[cid]) + below)

    def read(self, root: Cid, max_bytes: int = 1 << 30) -> bytes:
        return b"".join(visit.content for visit in walk(root, self.__getitem__, max_bytes))


def test_a_leaf_of_another_size_than_its_parent_says() -> None:
    blocks = Blocks()
    leaf = blocks.raw(LEAF)
    with pytest.raises(BadBlock, match="its parent says 3 in 4"):
        blocks.read(blocks.node(Link(leaf, 3, 4)))
    with pytest.raises(BadBlock, match="its parent says 4 in 400"):
        blocks.read(blocks.node(Link(leaf, 4, 400)))


def test_a_node_of_another_serialized_size_than_its_parent_says() -> None:
    blocks = Blocks()
    inner = blocks.node(blocks.link(blocks.raw(LEAF), 4))
    honest = blocks.link(inner, 4, below=4)
    assert blocks.read(blocks.node(honest)) == LEAF
    with pytest.raises(BadBlock, match="its parent says"):
        blocks.read(blocks.node(Link(inner, 4, honest.tsize + 1)))


def test_other_bytes_than_the_cid_names() -> None:
    blocks = Blocks()
    root = blocks.node(blocks.link(blocks.raw(LEAF), 4))
    blocks[Cid.of_raw(LEAF)] = b"loaf"
    with pytest.raises(BadBlock, match="not block"):
        blocks.read(root)


def test_a_file_larger_than_expected_stops_at_its_root() -> None:
    blocks = Blocks()
    missing = Cid.of_raw(b"never read")
    root = blocks.node(Link(missing, 1 << 40, 1 << 40))
    with pytest.raises(ContentTooLarge, match="at most 100"):
        blocks.read(root, max_bytes=100)


def test_a_tree_that_is_too_deep() -> None:
    blocks = Blocks()
    cid, below = blocks.raw(LEAF), 0
    for _ in range(MAX_DEPTH + 1):
        link = blocks.link(cid, 4, below)
        cid, below = blocks.node(link), link.tsize
    with pytest.raises(ContentTooLarge, match="deeper than"):
        blocks.read(cid)


def test_one_small_block_linked_a_million_times() -> None:
    blocks = Blocks()
    cid, size, tsize = blocks.raw(b"x"), 1, 1
    for _ in range(3):
        cid = blocks.node(*[Link(cid, size, tsize)] * 100)
        size, tsize = size * 100, len(blocks[cid]) + tsize * 100
    assert size == 1_000_000
    visited = 0
    with pytest.raises(ContentTooLarge, match="more than"):
        for _ in walk(cid, blocks.__getitem__, max_bytes=size):
            visited += 1
    assert visited < 2_000


def test_the_walk_does_not_recurse_and_holds_one_path() -> None:
    blocks = Blocks((block.cid, block.content) for block in build_file(io.BytesIO(bytes(3000)), Profile("p", 3, 10)))
    *_, root = blocks
    assert blocks.read(root) == bytes(3000)


def test_nothing_is_left_when_a_file_cannot_be_assembled(tmp_path: Path) -> None:
    blocks = Blocks()
    root = blocks.node(blocks.link(blocks.raw(LEAF), 4), Link(Cid.of_raw(b"gone"), 4, 4))

    def get_block(cid: Cid) -> bytes:
        if cid not in blocks:
            raise BlockMissing(cid, ["here"])
        return blocks[cid]

    (tmp_path / "file").write_bytes(b"as it was")
    with pytest.raises(BlockMissing):
        write_file(root, get_block, tmp_path / "file", 100)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"as it was"
