"""Reading a file's DAG when nobody is trusted: every block is checked against its CID and its parent's promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tallystick_protocol.content.cid import Cid, Codec
from tallystick_protocol.content.dag_pb import MAX_BLOCK_BYTES, parse_file_node
from tallystick_protocol.content.files import replacing
from tallystick_protocol.errors import BadBlock, ContentTooLarge

MAX_DEPTH: Final = 12
"""Width 174 over 256 KiB chunks reaches 58 TiB in five levels."""

_MEAN_BLOCK_BYTES: Final = 16 * 1024
_SPARE_BLOCKS: Final = 1024

BlockGetter = Callable[[Cid], bytes]
Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""


@dataclass(frozen=True, slots=True)
class Branch:
    """A block still to be read, and what its parent says of it; a root has no parent."""

    cid: Cid
    offset: int = 0
    """Where its bytes begin in the file."""
    depth: int = 0
    size_bytes: int | None = None
    tsize: int | None = None


@dataclass(frozen=True, slots=True)
class Visit:
    """A block that was read and checked."""

    branch: Branch
    block: bytes
    content: bytes
    """The file bytes in this very block; empty for a node with children."""
    size_bytes: int
    """File bytes here and below."""
    children: tuple[Branch, ...]


@dataclass(slots=True)
class Budget:
    """How much of a DAG may be read: its file's size, its depth, and blocks in proportion to that size.

    Blocks are counted as often as they are linked, so a small block linked a million times costs a million.
    """

    max_bytes: int
    num_blocks: int = 0

    def spend(self, visit: Visit) -> None:
        """Count a visit. Raises ContentTooLarge at the first block that goes beyond."""
        if visit.size_bytes > self.max_bytes:
            raise ContentTooLarge(
                f"a file of {visit.size_bytes} bytes, where at most {self.max_bytes} are expected",
                cid=str(visit.branch.cid),
            )
        if visit.branch.depth > MAX_DEPTH:
            raise ContentTooLarge(f"a tree deeper than {MAX_DEPTH} levels", cid=str(visit.branch.cid))
        self.num_blocks += 1
        limit = _SPARE_BLOCKS + self.max_bytes // _MEAN_BLOCK_BYTES
        if self.num_blocks + len(visit.children) > limit:
            raise ContentTooLarge(f"a tree of more than {limit} blocks for at most {self.max_bytes} bytes")


def open_block(branch: Branch, block: bytes) -> Visit:
    """Check a block against its CID and its parent, and find its children. Raises BadBlock."""
    if len(block) > MAX_BLOCK_BYTES:
        raise BadBlock(f"a block of {len(block)} bytes; at most {MAX_BLOCK_BYTES} are read", cid=str(branch.cid))
    branch.cid.check(block)
    if branch.cid.codec is Codec.RAW:
        _keeps_promise(branch, len(block), len(block))
        return Visit(branch, block, block, len(block), ())
    node = parse_file_node(block)
    _keeps_promise(branch, node.size_bytes, len(block) + sum(link.tsize for link in node.links))
    children, offset = [], branch.offset
    for link in node.links:
        children.append(Branch(link.cid, offset, branch.depth + 1, link.size_bytes, link.tsize))
        offset += link.size_bytes
    return Visit(branch, block, node.content, node.size_bytes, tuple(children))


def _keeps_promise(branch: Branch, size_bytes: int, tsize: int) -> None:
    if branch.size_bytes is not None and (branch.size_bytes, branch.tsize) != (size_bytes, tsize):
        raise BadBlock(
            f"block {branch.cid} holds {size_bytes} file bytes in {tsize}; "
            f"its parent says {branch.size_bytes} in {branch.tsize}"
        )


def walk(
    root: Cid, get_block: BlockGetter, max_bytes: int, wanted: Callable[[Branch], bool] | None = None
) -> Iterator[Visit]:
    """Visit a file's blocks depth first, parents before children, leaves in the file's order.

    Holds one block and the links beside the path to it. Skips branches that are not `wanted`. Raises BadBlock,
    ContentTooLarge, and whatever `get_block` raises.
    """
    budget = Budget(max_bytes)
    todo = [Branch(root)]
    while todo:
        branch = todo.pop()
        visit = open_block(branch, get_block(branch.cid))
        budget.spend(visit)
        todo.extend(child for child in reversed(visit.children) if wanted is None or wanted(child))
        yield visit


def nodes(root: Cid, get_block: BlockGetter, max_bytes: int) -> Iterator[Visit]:
    """The walk without its raw leaves below the root: enough to know every CID of the file."""
    return walk(root, get_block, max_bytes, wanted=lambda branch: branch.cid.codec is not Codec.RAW)


def write_file(
    root: Cid, get_block: BlockGetter, to_path: Path, max_bytes: int, progress: Progress | None = None
) -> int:
    """Assemble a file from its DAG, all of it verified, and put it at `to_path` in one step. Returns its size."""
    with replacing(to_path) as out:
        done = total = 0
        for visit in walk(root, get_block, max_bytes):
            total = total or visit.size_bytes
            if visit.content:
                out.write(visit.content)
                done += len(visit.content)
                if progress is not None:
                    progress(done, total)
    return done
