"""The first part of a start: pieces fetched and hashed in one thread, packed in another as soon as they are checked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tallystick_model.parallel import close_model
from tallystick_model.span import SpanModel
from tallystick_node.alone import alone
from tallystick_node.pieces import Pieces
from tallystick_protocol.content.cid import Cid
from tallystick_protocol.manifest import Manifest, Piece
from tallystick_protocol.types import Span


@dataclass(slots=True)
class Durations:
    """Where the time of a start went, seconds by step."""

    steps: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, step: str) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self.steps[step] = self.steps.get(step, 0.0) + time.monotonic() - begin

    def __str__(self) -> str:
        return ", ".join(f"{step} {seconds:.2f} s" for step, seconds in self.steps.items())


async def fetch_and_load(
    pieces: Pieces,
    manifest: Manifest,
    span: Span,
    load: Callable[[Callable[[Piece], Path]], SpanModel],
    took: Durations,
) -> SpanModel:
    """Fetch a span's pieces and load them. load(open_piece): runs in a thread; open_piece waits for a piece.

    A piece is opened only after all its bytes were checked. Raises what fetching and loading raise.
    """
    arriving: dict[Cid, Future[Path]] = {piece.cid: Future() for piece in manifest.span_pieces(span)}

    def arrived(piece: Piece, path: Path) -> None:
        if not arriving[piece.cid].done():  # pieces of the same bytes have one CID
            arriving[piece.cid].set_result(path)

    async def fetch() -> None:
        try:
            with took.of("fetching and hashing"):
                await pieces.fetch(manifest, span, arrived)
        except BaseException as error:
            for one in arriving.values():
                if not one.done():
                    one.set_exception(error)  # which ends the thread that waits for it
            raise

    def fill() -> SpanModel:
        with took.of("reading, checking and packing beside it"):
            return load(lambda piece: arriving[piece.cid].result())

    fetching, loading = asyncio.create_task(fetch()), asyncio.create_task(alone(fill))
    try:
        model = await loading
    except BaseException:
        fetching.cancel()
        await asyncio.gather(fetching, return_exceptions=True)
        raise
    try:
        await fetching  # the canary comes after the pieces
    except BaseException:
        close_model(model)
        raise
    return model
