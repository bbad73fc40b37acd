"""Evidence and pieces that a juror holds for a case: in a store of its own, served until the ruling, then dropped."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path

from tallystick_protocol.chain.reads import ModelRecord
from tallystick_protocol.content.cid import Cid, Codec
from tallystick_protocol.content.fetch import fetch_file
from tallystick_protocol.content.sources import Patience
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.errors import BadBlock, BadEvidence, BlockMissing, ConfigError, ContentTooLarge
from tallystick_protocol.evidence.bundle import MAGIC, MAX_BYTES
from tallystick_protocol.manifest import MAX_BYTES as MANIFEST_BYTES
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.types import Digest, Span

PATIENCE = Patience(race_after_s=2.0, deadline_s=20.0)
FETCH_S = 900.0
"""For everything that one case fetches at a time; a source that trickles is given up."""


class Holding:
    """A folder: `store` with what was fetched, `work` with the files of the case at hand."""

    def __init__(self, folder: Path, own: LocalStore, evidence_bytes: int, disk_bytes: int) -> None:
        """own: the node's pieces, which need not be fetched. evidence_bytes, disk_bytes: limits."""
        self.store = LocalStore(folder / "store")
        self._own, self._work = own, folder / "work"
        self._evidence_bytes, self._disk_bytes = evidence_bytes, disk_bytes

    async def evidence(self, digest: Digest, sources: Sequence[str]) -> Path:
        """The file whose CID has this digest, kept until `release`.

        Raises BlockMissing and TimeoutError where nobody gives it, BadEvidence where nobody could, ConfigError
        where it is more than this node's settings let a case cost it.
        """
        path = self._work / digest.hex()
        raw = Cid(Codec.RAW, digest)
        try:
            async with asyncio.timeout(FETCH_S):
                try:
                    await self._fetch(raw, path, sources)
                except BlockMissing:
                    pass
                else:
                    if path.read_bytes()[: len(MAGIC)] == MAGIC:
                        return path
                    # One digest, two readings: what is no evidence by itself is the root of a larger file.
                    self.store.put_block(path.read_bytes(), Codec.DAG_PB)
                    self.store.unpin(raw)
                await self._fetch(Cid(Codec.DAG_PB, digest), path, sources)
        except BadBlock as error:
            raise BadEvidence(f"the CID names no file: {error.message}") from None
        except ContentTooLarge as error:
            if self._evidence_bytes < MAX_BYTES:
                raise ConfigError(f"evidence beyond jury_bytes: {error.message}") from None
            raise BadEvidence(error.message) from None
        return path

    async def manifest(self, record: ModelRecord, sources: Sequence[str]) -> Path:
        """The manifest of a model, as the chain names it. Raises BlockMissing, TimeoutError."""
        return await self._file(Cid(Codec.RAW, record.manifest), MANIFEST_BYTES, sources)

    async def pieces(self, manifest: Manifest, span: Span, sources: Sequence[str]) -> dict[str, str]:
        """The file of each piece of a span, by its CID. Raises BlockMissing, TimeoutError, ConfigError."""
        pieces = manifest.span_pieces(span)
        lacking = sum(piece.bytes for piece in pieces if not (self._own.has(piece.cid) or self.store.has(piece.cid)))
        room = min(self._disk_bytes - self.size_bytes, shutil.disk_usage(self.store.root).free // 2)
        if lacking > room:
            raise ConfigError(f"layers {span} of {manifest.name} take {lacking} bytes of pieces, {room} may be fetched")
        async with asyncio.timeout(FETCH_S):
            return {str(one.cid): str(await self._file(one.cid, one.bytes, sources)) for one in pieces}

    @property
    def size_bytes(self) -> int:
        """What the store takes on disk."""
        return sum(path.stat().st_size for path in self.store.root.rglob("*") if path.is_file())

    def tidy(self, keep: Sequence[Digest]) -> None:
        """Drop everything but evidence with these digests."""
        shutil.rmtree(self._work, ignore_errors=True)
        for cid in self.store.pins():
            if cid.digest not in keep:
                self.store.unpin(cid)
        self.store.collect_garbage()

    async def _file(self, cid: Cid, max_bytes: int, sources: Sequence[str]) -> Path:
        path = self._work / str(cid)
        try:
            await asyncio.to_thread(self._own.read_file, cid, path, max_bytes)
        except (BlockMissing, BadBlock):
            async with asyncio.timeout(FETCH_S):
                await fetch_file(cid, path, sources, store=self.store, max_bytes=max_bytes, patience=PATIENCE)
        return path

    async def _fetch(self, cid: Cid, path: Path, sources: Sequence[str]) -> None:
        limit = min(MAX_BYTES, self._evidence_bytes)
        await fetch_file(cid, path, sources, store=self.store, max_bytes=limit, patience=PATIENCE)
