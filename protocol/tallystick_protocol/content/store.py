"""Where blocks are kept: the interface every store has, and the store in a local folder.

Layout of a local store; every name is one that `str(cid)` wrote:

| path                | content                                                                  |
|---------------------|--------------------------------------------------------------------------|
| blocks/<xy>/<cid>   | loose blocks: dag-pb nodes, one-block files, leaves of files under way   |
| files/<cid>         | a whole file; its raw leaves are read from it by offset                  |
| files/<cid>.leaves  | where they lie (`leaves.py`)                                             |
| pins/<cid>          | empty: the DAG under this CID is kept by `collect_garbage`               |
| new/                | files being written                                                      |
| lock                | shared by writers, exclusive for `collect_garbage` and `drop`            |
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Final, Protocol

from tallystick_protocol.content.cid import Cid, Codec
from tallystick_protocol.content.dag import Progress, Visit, nodes, walk, write_file
from tallystick_protocol.content.dag_pb import MAX_BLOCK_BYTES, parse_file_node
from tallystick_protocol.content.files import disk_errors, locked, replacing, sync_folder
from tallystick_protocol.content.leaves import SUFFIX, Leaf, LeafIndex, encode_leaves, read_leaves
from tallystick_protocol.content.unixfs import UNIXFS_V1_2025, ByteSource, Profile, build_file
from tallystick_protocol.errors import BadBlock, BadCid, BlockMissing, ContentTooLarge

_log = logging.getLogger(__name__)

_ANY_SIZE: Final = 1 << 60
"""For files that are here already: their size was bounded when they came."""


class Store(Protocol):
    """What keeps blocks. Whatever it returns was checked against the CID it was asked for."""

    def put_file(self, source: Path | ByteSource) -> Cid:
        """Keep a file as a DAG of profile `unixfs-v1-2025` and return its root."""

    def put_block(self, block: bytes, codec: Codec) -> Cid:
        """Keep one block. Raises BadBlock for a malformed dag-pb node, ContentTooLarge."""

    def has(self, cid: Cid) -> bool:
        """Whether the block seems to be here; its bytes are not read."""

    def get_block(self, cid: Cid) -> bytes:
        """The bytes that `cid` names. Raises BlockMissing."""

    def read_file(self, cid: Cid, to_path: Path, max_bytes: int, progress: Progress | None = None) -> int:
        """Put the file under `cid` at `to_path` in one step and return its size.

        Raises BlockMissing, BadBlock, ContentTooLarge; then `to_path` is as it was.
        """

    def pin(self, cid: Cid) -> None:
        """Keep the whole DAG until `unpin`. Raises BlockMissing unless all of it is here."""

    def unpin(self, cid: Cid) -> None:
        """No longer keep it on purpose; no error if it was not pinned."""

    def pins(self) -> tuple[Cid, ...]:
        """The roots that are pinned."""


class LocalStore:
    """A store in a folder, shared by any number of threads and processes."""

    def __init__(self, root: Path, *, profile: Profile = UNIXFS_V1_2025, lock_timeout_s: float = 30.0) -> None:
        self.root = root
        self._profile = profile
        self._lock_timeout_s = lock_timeout_s
        self._blocks, self._files, self._pins, self._new = (root / name for name in ("blocks", "files", "pins", "new"))
        for folder in (self._blocks, self._files, self._pins, self._new):
            folder.mkdir(parents=True, exist_ok=True)
        self._leaves = LeafIndex(self._files)

    def in_use(self) -> AbstractContextManager[None]:
        """While held, nothing is collected as garbage. Raises ContentError if a collection takes too long."""
        return locked(self.root / "lock", shared=True, timeout_s=self._lock_timeout_s)

    def put_file(self, source: Path | ByteSource) -> Cid:
        if isinstance(source, Path):
            with source.open("rb") as opened:
                return self.put_file(opened)
        with self.in_use(), self._staged() as staged:
            leaves: list[Leaf] = []
            offset = 0
            root = Cid.of_raw(b"")
            with replacing(staged) as out:
                for block in build_file(source, self._profile):
                    root = block.cid
                    if root.codec is Codec.RAW:
                        out.write(block.content)
                        leaves.append(Leaf(root.digest, offset, len(block.content)))
                        offset += len(block.content)
                    else:
                        self.put_block(block.content, root.codec)
            if root.codec is Codec.RAW:
                self.put_block(staged.read_bytes(), root.codec)
            else:
                self._adopt(root, staged, leaves)
        return root

    def put_block(self, block: bytes, codec: Codec) -> Cid:
        if len(block) > MAX_BLOCK_BYTES:
            raise ContentTooLarge(f"a block of {len(block)} bytes; at most {MAX_BLOCK_BYTES} are kept")
        if codec is Codec.DAG_PB:
            parse_file_node(block)
        cid = Cid.of(block, codec)
        with self.in_use():
            if self._read_anywhere(cid) is None:
                with replacing(self._loose(cid), self._new) as out:
                    out.write(block)
        return cid

    def has(self, cid: Cid) -> bool:
        return self._loose(cid).exists() or (cid.codec is Codec.RAW and bool(self._leaves.find(cid.digest)))

    def get_block(self, cid: Cid) -> bytes:
        block = self._read_anywhere(cid)
        if block is None:
            raise BlockMissing(cid, [str(self.root)])
        return block

    def gather(self, cid: Cid, max_bytes: int) -> None:
        """Turn a file whose blocks all lie loose into a whole file. A file of one block stays as it is.

        Raises BlockMissing, BadBlock, ContentTooLarge.
        """
        if cid.codec is Codec.RAW:
            return
        with self.in_use(), self._staged() as staged:
            leaves: list[Leaf] = []
            with replacing(staged) as out:
                for visit in walk(cid, self.get_block, max_bytes):
                    out.write(visit.content)
                    if visit.branch.cid.codec is Codec.RAW:
                        leaves.append(Leaf(visit.branch.cid.digest, visit.branch.offset, len(visit.content)))
            self._adopt(cid, staged, leaves)

    def read_file(self, cid: Cid, to_path: Path, max_bytes: int, progress: Progress | None = None) -> int:
        """As in `Store`; a whole file that proves sound is hard-linked rather than copied, so do not write to it."""
        with self.in_use():
            size = self._sound_size(cid, max_bytes, progress)
            if size is not None and self._link(self._whole(cid), to_path):
                return size
            return write_file(cid, self.get_block, to_path, max_bytes, progress)

    def pin(self, cid: Cid) -> None:
        with self.in_use():
            for visit in nodes(cid, self.get_block, _ANY_SIZE):
                for child in visit.children:
                    if not self.has(child.cid):
                        raise BlockMissing(child.cid, [str(self.root)])
            with replacing(self._pins / str(cid), self._new):
                pass

    def unpin(self, cid: Cid) -> None:
        (self._pins / str(cid)).unlink(missing_ok=True)

    def pins(self) -> tuple[Cid, ...]:
        return tuple(_cids_in(self._pins))

    def collect_garbage(self) -> int:
        """Delete what no pin reaches and return the bytes freed.

        Raises BlockMissing, having deleted nothing, when a pinned DAG is incomplete: fetch it again or unpin it.
        """
        with locked(self.root / "lock", shared=False, timeout_s=self._lock_timeout_s):
            kept = {cid for root in self.pins() for cid in self.cids_of(root)}
            freed = sum(self._drop_whole(cid, kept) for cid in _cids_in(self._files) if cid not in kept)
            for folder in self._blocks.iterdir():
                freed += sum(_delete(folder / str(cid)) for cid in _cids_in(folder) if cid not in kept)
            freed += sum(_delete(path) for path in self._new.iterdir())
            self._leaves.forget()
        return freed

    def drop(self, root: Cid) -> int:
        """Unpin a DAG, delete what no other pin reaches of it, and return the bytes freed. Nothing else goes.

        Raises BlockMissing, having deleted nothing, when a pinned DAG is incomplete.
        """
        with locked(self.root / "lock", shared=False, timeout_s=self._lock_timeout_s):
            kept = {cid for other in self.pins() if other != root for cid in self.cids_of(other)}
            mine = set(self.cids_of(root)) - kept
            self.unpin(root)
            freed = self._drop_whole(root, kept) if root in mine else 0
            freed += sum(_delete(self._loose(cid)) for cid in mine)
            self._leaves.forget()
        return freed

    def cids_of(self, root: Cid) -> Iterator[Cid]:
        """Every CID of a DAG that is here; its raw leaves are not read. Raises BlockMissing."""
        yield root
        for visit in nodes(root, self.get_block, _ANY_SIZE):
            for child in visit.children:
                yield child.cid

    def _loose(self, cid: Cid) -> Path:
        name = str(cid)
        return self._blocks / name[-2:] / name

    def _whole(self, cid: Cid) -> Path:
        return self._files / str(cid)

    @contextmanager
    def _staged(self) -> Iterator[Path]:
        path = self._new / secrets.token_hex(16)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _read_anywhere(self, cid: Cid) -> bytes | None:
        loose = self._loose(cid)
        with suppress(FileNotFoundError), loose.open("rb") as source:
            block = source.read(MAX_BLOCK_BYTES + 1)
            if _is(cid, block):
                return block
            _log.warning("block %s is damaged on disk: deleted", cid)
            loose.unlink(missing_ok=True)
        for path, leaf in self._leaves.find(cid.digest) if cid.codec is Codec.RAW else ():
            with suppress(FileNotFoundError), path.open("rb") as source:
                block = _read_leaf(source, leaf)
                if _is(cid, block):
                    return block
                _log.warning("block %s is damaged in %s: fetch the file again", cid, path)
        return None

    def _adopt(self, cid: Cid, staged: Path, leaves: list[Leaf]) -> None:
        staged.chmod(0o444)
        with disk_errors(self._files):
            os.replace(staged, self._whole(cid))
            sync_folder(self._files)
        with replacing(self._files / f"{cid}{SUFFIX}", self._new) as out:
            out.write(encode_leaves(leaves))
        for leaf in leaves:
            self._loose(leaf.cid).unlink(missing_ok=True)

    def _sound_size(self, cid: Cid, max_bytes: int, progress: Progress | None) -> int | None:
        """The size of the whole file if it is here and each of its bytes is right: its own, not a copy's elsewhere."""
        size = done = 0
        try:
            with self._whole(cid).open("rb") as source:
                for visit in nodes(cid, self.get_block, max_bytes):
                    size = size or visit.size_bytes
                    for leaf in _leaves_under(visit):
                        leaf.cid.check(_read_leaf(source, leaf))
                        done += leaf.size_bytes
                        if progress is not None:
                            progress(done, size)
                return size if source.seek(0, os.SEEK_END) == size == done else None
        except (FileNotFoundError, BadBlock):
            return None

    def _link(self, whole: Path, to_path: Path) -> bool:
        to_path.parent.mkdir(parents=True, exist_ok=True)
        name = to_path.parent / f".new-{secrets.token_hex(8)}"
        try:
            os.link(whole, name)
        except OSError:
            # Another file system, or one without hard links: copied instead.
            return False
        try:
            # Replacing a name by another name of the same file does nothing, hence the unlink.
            os.replace(name, to_path)
        finally:
            name.unlink(missing_ok=True)
        return True

    def _drop_whole(self, cid: Cid, kept: set[Cid]) -> int:
        whole, table = self._whole(cid), self._files / f"{cid}{SUFFIX}"
        with suppress(FileNotFoundError), whole.open("rb") as source:
            for leaf in read_leaves(table):
                if leaf.cid in kept:
                    with replacing(self._loose(leaf.cid), self._new) as out:
                        out.write(_read_leaf(source, leaf))
        return _delete(table) + _delete(whole)


def _cids_in(folder: Path) -> Iterator[Cid]:
    for name in sorted(os.listdir(folder)):
        with suppress(BadCid):
            yield Cid.parse(name)


def _leaves_under(visit: Visit) -> Iterator[Leaf]:
    if visit.content:
        yield Leaf(Cid.of_raw(visit.content).digest, visit.branch.offset, len(visit.content))
    for child in visit.children:
        if child.cid.codec is Codec.RAW:
            yield Leaf(child.cid.digest, child.offset, child.size_bytes or 0)


def _read_leaf(source: IO[bytes], leaf: Leaf) -> bytes:
    source.seek(leaf.offset)
    return source.read(min(leaf.size_bytes, MAX_BLOCK_BYTES + 1))


def _is(cid: Cid, block: bytes) -> bool:
    try:
        cid.check(block)
    except BadBlock:
        return False
    return True


def _delete(path: Path) -> int:
    with suppress(FileNotFoundError):
        size = path.stat().st_size
        path.unlink()
        return size
    return 0
