"""The dag-pb node of a file: how one block lists the blocks below it.

A node (PBNode), every link before the data:

| field      | wire key | value                                                                  |
|------------|----------|------------------------------------------------------------------------|
| Links, 0.. | 0x12     | length-prefixed PBLink                                                 |
| Data, 1    | 0x0a     | length-prefixed UnixFS data                                            |

A link (PBLink):

| field      | wire key | value                                                                  |
|------------|----------|------------------------------------------------------------------------|
| Hash       | 0x0a     | length-prefixed binary CID                                             |
| Name       | 0x12     | written as the empty string; absent is read too                        |
| Tsize      | 0x18     | varint: serialized bytes of the child and of all blocks below it       |

UnixFS data:

| field      | wire key | value                                                                  |
|------------|----------|------------------------------------------------------------------------|
| Type       | 0x08     | varint 2, a file                                                       |
| Data       | 0x12     | length-prefixed file bytes; only in a leaf, only read, never written   |
| filesize   | 0x18     | varint: file bytes here and below                                      |
| blocksizes | 0x20     | varint: file bytes below each link, one per link, in the links' order  |

Fields come once (links and blocksizes aside) and in this order, varints are minimal and below 2^63. Everything else,
UnixFS 1.5's mode and mtime included, is refused: two nodes that read alike must be one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tallystick_protocol.content.cid import Cid
from tallystick_protocol.errors import BadBlock, BadCid

MAX_BLOCK_BYTES: Final = 2 * 1024 * 1024
"""The largest block anyone on IPFS transfers."""

_VARINT, _BYTES = 0, 2
_FILE: Final = 2
_OTHER_TYPES: Final = {
    0: "a legacy raw node",
    1: "a directory",
    3: "a metadata node",
    4: "a symbolic link",
    5: "a sharded directory",
}


@dataclass(frozen=True, slots=True)
class Link:
    """A child as its parent describes it."""

    cid: Cid
    size_bytes: int
    """File bytes below."""
    tsize: int
    """Serialized bytes below, the child's own block included."""


@dataclass(frozen=True, slots=True)
class FileNode:
    """A file or a part of one: either links, or (a leaf of older trees) its bytes."""

    links: tuple[Link, ...]
    content: bytes = b""

    @property
    def size_bytes(self) -> int:
        """File bytes here and below."""
        return len(self.content) + sum(link.size_bytes for link in self.links)

    def encode(self) -> bytes:
        """The block, byte for byte as Kubo writes it."""
        block = bytearray()
        for link in self.links:
            _append_bytes(block, 2, _encode_link(link))
        unixfs = bytearray()
        _append_varint(unixfs, 1, _FILE)
        if self.content:
            _append_bytes(unixfs, 2, self.content)
        _append_varint(unixfs, 3, self.size_bytes)
        for link in self.links:
            _append_varint(unixfs, 4, link.size_bytes)
        _append_bytes(block, 1, bytes(unixfs))
        return bytes(block)


def parse_file_node(block: bytes) -> FileNode:
    """Read a dag-pb block as a file node. Raises BadBlock, saying which rule of the tables above it breaks."""
    if len(block) > MAX_BLOCK_BYTES:
        raise BadBlock(f"a block of {len(block)} bytes; at most {MAX_BLOCK_BYTES} are read")
    links: list[bytes] = []
    unixfs: bytes | None = None
    for number, value in _fields(block, "node"):
        if number == 2 and isinstance(value, bytes):
            if unixfs is not None:
                raise BadBlock("a link after the node's data")
            links.append(value)
        elif number == 1 and isinstance(value, bytes) and unixfs is None:
            unixfs = value
        else:
            raise BadBlock(f"field {number} of a dag-pb node is unknown or repeated")
    if unixfs is None:
        raise BadBlock("a dag-pb node without UnixFS data")
    # First the data: that a directory is one says more than that its links have names.
    content, filesize, sizes = _parse_unixfs(unixfs)
    return _checked([_parse_link(link) for link in links], content, filesize, sizes)


def _parse_link(message: bytes) -> tuple[Cid, int]:
    found: dict[int, int | bytes] = {}
    for number, value in _fields(message, "link"):
        if number not in (1, 2, 3) or (found and number <= max(found)):
            raise BadBlock(f"link field {number} is unknown, repeated or out of order")
        found[number] = value
    binary, name, tsize = found.get(1), found.get(2, b""), found.get(3)
    if not isinstance(binary, bytes) or not isinstance(tsize, int):
        raise BadBlock("a link without a hash or without a size")
    if name != b"":
        raise BadBlock("a named link inside a file")
    try:
        return Cid.from_bytes(binary), tsize
    except BadCid as error:
        raise BadBlock(f"a link to something unreadable: {error}") from error


def _parse_unixfs(message: bytes) -> tuple[bytes | None, int, list[int]]:
    kind: int | None = None
    filesize: int | None = None
    content: bytes | None = None
    sizes: list[int] = []
    last = 0
    for number, value in _fields(message, "UnixFS"):
        if number < last or (number == last and number != 4):
            raise BadBlock(f"UnixFS field {number} is repeated or out of order")
        last = number
        if number == 2 and isinstance(value, bytes):
            content = value
        elif number == 1 and isinstance(value, int):
            kind = value
            if kind != _FILE:
                raise BadBlock(f"{_OTHER_TYPES.get(kind, f'UnixFS type {kind}')}, where a file is expected")
        elif number == 3 and isinstance(value, int):
            filesize = value
        elif number == 4 and isinstance(value, int):
            sizes.append(value)
        else:
            raise BadBlock(f"UnixFS field {number} is not read here")
    if kind is None or filesize is None:
        raise BadBlock("UnixFS data without a type or a file size")
    return content, filesize, sizes


def _checked(children: list[tuple[Cid, int]], content: bytes | None, filesize: int, sizes: list[int]) -> FileNode:
    if len(children) != len(sizes):
        raise BadBlock(f"{len(children)} links, but {len(sizes)} block sizes")
    if content is not None and (children or not content):
        raise BadBlock("inline bytes that are empty or beside links")
    for (_, tsize), size in zip(children, sizes, strict=True):
        # Every child adds bytes: this bounds the blocks of a file by its size.
        if not 0 < size <= tsize:
            raise BadBlock(f"a link of {size} file bytes in {tsize} serialized bytes")
    node = FileNode(
        tuple(Link(cid, size, tsize) for (cid, tsize), size in zip(children, sizes, strict=True)), content or b""
    )
    if node.size_bytes != filesize:
        raise BadBlock(f"a file size of {filesize} over {node.size_bytes} bytes")
    return node


def _encode_link(link: Link) -> bytes:
    message = bytearray()
    _append_bytes(message, 1, link.cid.to_bytes())
    _append_bytes(message, 2, b"")
    _append_varint(message, 3, link.tsize)
    return bytes(message)


def _append_bytes(out: bytearray, number: int, value: bytes) -> None:
    out += bytes((number << 3 | _BYTES,)) + encode_varint(len(value)) + value


def _append_varint(out: bytearray, number: int, value: int) -> None:
    out += bytes((number << 3 | _VARINT,)) + encode_varint(value)


def encode_varint(value: int) -> bytes:
    """Unsigned LEB128: seven bits per byte, the lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _fields(message: bytes, where: str) -> Iterator[tuple[int, int | bytes]]:
    """The protobuf fields of a message, varints and length-prefixed bytes only."""
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at, where)
        value, at = _read_varint(message, at, where)
        if key & 7 == _VARINT:
            yield key >> 3, value
        elif key & 7 == _BYTES:
            if value > len(message) - at:
                raise BadBlock(f"a {where} field that runs past its end")
            yield key >> 3, message[at : at + value]
            at += value
        else:
            raise BadBlock(f"a {where} field of wire type {key & 7}")


def _read_varint(message: bytes, at: int, where: str) -> tuple[int, int]:
    value = 0
    for length, byte in enumerate(message[at : at + 9]):
        value |= (byte & 0x7F) << 7 * length
        if byte < 0x80:
            if byte == 0 and length > 0:
                raise BadBlock(f"an over-long number in a {where}")
            return value, at + length + 1
    raise BadBlock(f"a number that does not end in a {where}")
