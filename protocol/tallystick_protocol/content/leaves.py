"""Where the raw leaves of whole files lie, so that a block can be read out of the file it is part of.

Beside each whole file `<cid>` stands `<cid>.leaves`, one record of 44 bytes per raw leaf:

| bytes  | value                       |
|--------|-----------------------------|
| 0..32  | digest of the leaf          |
| 32..40 | its offset, u64 big-endian  |
| 40..44 | its size, u32 big-endian    |

Nothing here is trusted: what is read by it is checked against the CID that was asked for.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tallystick_protocol.content.cid import Cid, Codec
from tallystick_protocol.errors import BadCid

SUFFIX: Final = ".leaves"
_RECORD: Final = struct.Struct(">32sQI")


@dataclass(frozen=True, slots=True)
class Leaf:
    """A raw block inside a whole file."""

    digest: bytes
    offset: int
    size_bytes: int

    @property
    def cid(self) -> Cid:
        """Its block's name."""
        return Cid(Codec.RAW, self.digest)


def encode_leaves(leaves: Iterable[Leaf]) -> bytes:
    """The contents of a `.leaves` file."""
    return b"".join(_RECORD.pack(leaf.digest, leaf.offset, leaf.size_bytes) for leaf in leaves)


def read_leaves(path: Path) -> Iterator[Leaf]:
    """The leaves in a `.leaves` file; a torn last record is left out."""
    table = path.read_bytes()
    whole = len(table) - len(table) % _RECORD.size
    return (Leaf(*record) for record in _RECORD.iter_unpack(table[:whole]))


class LeafIndex:
    """Digest -> places, over every `.leaves` file of a folder; other processes' additions are found on a miss."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[bytes, tuple[tuple[Path, Leaf], ...]] = {}
        self._read: set[str] = set()
        self._lock = threading.Lock()

    def find(self, digest: bytes) -> tuple[tuple[Path, Leaf], ...]:
        """The whole files that hold this leaf, and where."""
        with self._lock:
            if digest not in self._places:
                self._read_new()
            places = self._places.get(digest, ())
        return tuple((path, leaf) for path, leaf in places if path.exists())

    def forget(self) -> None:
        """Read every table anew when next asked."""
        with self._lock:
            self._places.clear()
            self._read.clear()

    def _read_new(self) -> None:
        for table in self._folder.glob("b*" + SUFFIX):
            if table.name in self._read:
                continue
            with suppress(BadCid, FileNotFoundError):
                root = Cid.parse(table.name.removesuffix(SUFFIX))
                for leaf in read_leaves(table):
                    self._places[leaf.digest] = (*self._places.get(leaf.digest, ()), (self._folder / str(root), leaf))
                self._read.add(table.name)
