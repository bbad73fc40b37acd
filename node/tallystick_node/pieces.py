"""Fetching what a span needs, and nothing else: the manifest, its pieces and its canary, by CID, verified."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from tallystick_node.planning.measure import check_disk
from tallystick_protocol.chain.reads import ModelRecord
from tallystick_protocol.content.cid import Cid, Codec
from tallystick_protocol.content.fetch import fetch_file
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.errors import BadBlock, BlockMissing, ContentError, ManifestError
from tallystick_protocol.manifest import MAX_BYTES, Manifest, Piece
from tallystick_protocol.types import Span

log = logging.getLogger(__name__)

CANARY_BYTES = 1 << 26


class Pieces:
    """One model's files in this node's store, and where to get the missing ones."""

    def __init__(self, store: LocalStore, folder: Path, sources: Sequence[str]) -> None:
        """sources: base URLs of gateways and of other nodes, best first. folder: where the files are linked to."""
        self._store = store
        self._folder = folder
        self._sources = list(sources)
        folder.mkdir(parents=True, exist_ok=True)

    async def manifest(self, record: ModelRecord) -> Manifest:
        """The manifest that the chain names. Raises ManifestError when it is not what the chain says of it."""
        cid = Cid(Codec.RAW, record.manifest)
        path = await self._fetch("the manifest", cid, MAX_BYTES)
        manifest = Manifest.from_bytes(path.read_bytes())
        if manifest.weights != record.weights or manifest.layers != record.layers:
            raise ManifestError(
                "the manifest's pieces are not the ones that the chain records: do not serve this model"
            )
        return manifest

    async def fetch(
        self, manifest: Manifest, span: Span, arrived: Callable[[Piece, Path], None] = lambda _piece, _path: None
    ) -> None:
        """Bring every piece of a span and its canary; the first span brings the tokenizer, too, for clients.

        arrived(piece, file): called for every piece as soon as all its bytes are checked.
        What is here already is read and hashed anew: a disk may forget a bit after it was checked; what is damaged is
        fetched again. Raises BlockMissing naming the layer that nobody has, ConfigError when the disk is too small.
        """
        pieces = manifest.span_pieces(span)
        lacking = [piece for piece in pieces if not self._store.has(piece.cid)]
        if lacking:
            total = sum(piece.bytes for piece in lacking)
            check_disk(self._store.root, total, max(piece.bytes for piece in lacking))
            log.info("fetching %d pieces of %s, %.1f MB", len(lacking), manifest.name, total / 1e6)
        for piece in pieces:
            arrived(piece, await self._fetch(piece.name, piece.cid, piece.bytes))
        canary = manifest.canary
        decodes = 0 < manifest.encoder_layers <= span.start
        memory = [canary.rows[manifest.encoder_layers]] if decodes else []
        for cid in (canary.rows[span.start], canary.rows[span.end], canary.output, *memory):
            await self._fetch("the canary", cid, CANARY_BYTES)
        for name, file in manifest.tokenizer.items() if span.start == 0 else ():
            await self._fetch(f"the tokenizer's {name}", file.cid, file.bytes)

    def drop(self, manifest: Manifest, span: Span) -> None:
        """Give up the pieces that a span does not need. Not for a store that other nodes share: pins have no owner."""
        kept = {piece.cid for piece in manifest.span_pieces(span)}
        for piece in manifest.pieces:
            if piece.cid not in kept:
                self._store.unpin(piece.cid)
                self.path(piece).unlink(missing_ok=True)
        freed = self._store.collect_garbage()
        if freed:
            log.info("dropped %.1f MB of pieces that layers %s do not need", freed / 1e6, span)

    def path(self, piece: Piece) -> Path:
        """The file of a fetched piece."""
        return self._folder / str(piece.cid)

    async def _fetch(self, what: str, cid: Cid, max_bytes: int) -> Path:
        path = self._folder / str(cid)
        if self._store.has(cid):
            try:
                await asyncio.to_thread(self._store.read_file, cid, path, max_bytes)
            except (BlockMissing, BadBlock) as error:
                log.warning("%s is damaged on disk and is fetched again: %s", what, error)
            else:
                return path
        try:
            await fetch_file(cid, path, self._sources, store=self._store, max_bytes=max_bytes)
        except BlockMissing as error:
            missing = BlockMissing(error.cid, error.tried)
            missing.message = f"nobody asked holds {what}: {error.message}; add a source that does"
            missing.args = (missing.message,)
            raise missing from None
        except ContentError as error:
            raise type(error)(f"{what}: {error.message}") from None
        return path
