"""Building the DAG of a file as `ipfs add` does: equal chunks as raw leaves under a balanced tree.

The leaves are the chunks; a node takes up to `width` consecutive leaves, a node above it up to `width` nodes, until one
is left. All leaves lie equally deep. A file of one chunk is that raw block alone; an empty file is the empty raw block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from tallystick_protocol.content.cid import Cid, Codec
from tallystick_protocol.content.dag_pb import FileNode, Link


@dataclass(frozen=True, slots=True)
class Profile:
    """The numbers two builders must share to get the same CID."""

    name: str
    chunk_bytes: int
    width: int


UNIXFS_V1_2025: Final = Profile("unixfs-v1-2025", chunk_bytes=1024 * 1024, width=1024)
"""IPIP-499; every piece is published with it."""

UNIXFS_256K: Final = Profile("unixfs-256k-174", chunk_bytes=256 * 1024, width=174)
"""`ipfs add --cid-version=1 --raw-leaves`, what most of IPFS holds."""


class ByteSource(Protocol):
    """What is read from: an open binary file, or anything like it. Short reads are fine; b"" is the end."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Block:
    """One block of a file's DAG, on its way into a store."""

    cid: Cid
    content: bytes


def build_file(source: ByteSource, profile: Profile = UNIXFS_V1_2025) -> Iterator[Block]:
    """Every block of a file's DAG, children before their parent, the root last.

    Leaves come in the file's order, so a raw leaf's offset is the sum of those before it. Holds one chunk and at most
    `width` links per level.
    """
    levels: list[list[Link]] = [[]]
    while True:
        chunk = _read_chunk(source, profile.chunk_bytes)
        # Nothing after the last full chunk is the end of the file; nothing at all is an empty file.
        if not chunk and levels != [[]]:
            break
        cid = Cid.of_raw(chunk)
        yield Block(cid, chunk)
        yield from _append(levels, 0, Link(cid, len(chunk), len(chunk)), profile.width)
        if len(chunk) < profile.chunk_bytes:
            break
    for depth, links in enumerate(levels):
        if depth == len(levels) - 1 and len(links) == 1:
            return
        yield from _close(levels, depth, profile.width)


def file_cid(source: ByteSource, profile: Profile = UNIXFS_V1_2025) -> Cid:
    """The CID a file would have, without storing it."""
    root = Cid.of_raw(b"")
    for block in build_file(source, profile):
        root = block.cid
    return root


def _append(levels: list[list[Link]], depth: int, link: Link, width: int) -> Iterator[Block]:
    # A full level is closed only when one more link comes: until then it may be the root's.
    if len(levels[depth]) == width:
        yield from _close(levels, depth, width)
    levels[depth].append(link)


def _close(levels: list[list[Link]], depth: int, width: int) -> Iterator[Block]:
    node = FileNode(tuple(levels[depth]))
    levels[depth].clear()
    block = node.encode()
    cid = Cid.of(block, Codec.DAG_PB)
    yield Block(cid, block)
    if depth + 1 == len(levels):
        levels.append([])
    tsize = len(block) + sum(link.tsize for link in node.links)
    yield from _append(levels, depth + 1, Link(cid, node.size_bytes, tsize), width)


def _read_chunk(source: ByteSource, size: int) -> bytes:
    chunk = source.read(size)
    if len(chunk) == size or not chunk:
        return chunk
    parts, have = [chunk], len(chunk)
    while have < size and (chunk := source.read(size - have)):
        parts.append(chunk)
        have += len(chunk)
    return b"".join(parts)
