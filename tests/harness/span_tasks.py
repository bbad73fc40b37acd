"""The tasks' backend over published spans in this process: what nodes compute, without the network between them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.checkpoints import Published, published
from harness.one_model import OneModel
from tallystick.client import Encoded
from tallystick.verdict import Verdict
from tallystick_model.segments import Cache, Segment
from tallystick_model.span import SpanModel
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.types import Span


class SpanTasks(OneModel):
    """A checkpoint that is published, and cut into one-layer spans; canonical where it has rules for that."""

    def __init__(self, checkpoint: Path, root: Path) -> None:
        self.checkpoint = checkpoint
        self.served: Published = published(checkpoint, root)
        super().__init__(checkpoint, self.served.manifest)
        self.encodings = 0
        manifest = self.manifest
        first = manifest.stack_of(Span(0, 1))
        self._first = self._cut(first)
        self._last = self._cut(manifest.stack_of(Span(manifest.layers - 1, manifest.layers))) \
            if first.end < manifest.layers else self._first

    def _cut(self, stack: Span) -> list[SpanModel]:
        return [self.served.load(Span(a, b)) for a, b in pairwise(range(stack.start, stack.end + 1))]

    async def run(
        self, model: str, ids: list[int], *, token_types: list[int] | None = None, want: list[int] | None = None,
        verify: str = "audit",
    ) -> Encoded:  # fmt: skip
        self.encodings += 1
        wanted = want
        if wanted is None and self.manifest.output_of(self.manifest.stack_of(Span(0, 1))) == "label":
            wanted = [len(ids) - 1]
        types = None if token_types is None else torch.tensor(token_types)
        caches = [span.new_cache(len(ids)) for span in self._first]
        rows = torch.tensor(ids)
        for span, cache in zip(self._first, caches, strict=True):
            given = types if span.is_first else None
            rows = span.forward([Segment(cache, 0, rows, wanted=wanted, token_types=given)])[0]
        return Encoded(rows.numpy(), [], Verdict("off"))

    def decoder(
        self, model: str, *, max_length: int, beams: int = 1, dense: bool = False, memory: np.ndarray | None = None,
        verify: str = "audit",
    ) -> SpanDecoder:  # fmt: skip
        return SpanDecoder(self.manifest, self._last, max_length, beams, dense, memory)


class SpanDecoder:
    """One session for each beam, forked as nodes fork them."""

    def __init__(
        self, manifest: Manifest, spans: list[SpanModel], max_length: int, beams: int, dense: bool,
        memory: np.ndarray | None,
    ) -> None:  # fmt: skip
        self.manifest = manifest
        self.verdict = Verdict("off")
        self.route: list[Any] = []
        self._spans = spans
        self._dense = dense
        states = None if memory is None else torch.from_numpy(memory.copy())
        self._caches: list[list[Cache]] = [
            [span.new_cache(max_length, states) for span in spans] for _ in range(beams)  # type: ignore[misc]
        ]
        self._fresh = lambda: [span.new_cache(max_length, states) for span in spans]
        self._rows: list[dict[int, torch.Tensor]] = [{} for _ in range(beams)]

    async def __aenter__(self) -> SpanDecoder:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def feed(self, ids: list[int], *, beam: int = 0, want: str = "last") -> None:
        caches, count = self._caches[beam], len(ids)
        first = caches[0].length
        wanted = {"last": [count - 1], "all": list(range(count)), "none": []}[want]
        rows = torch.tensor(ids)
        for span, cache in zip(self._spans, caches, strict=True):
            rows = span.forward([Segment(cache, first, rows, wanted=wanted)])[0]
        self._rows[beam] |= {first + at: row for at, row in zip(wanted, rows, strict=True)}

    async def row(self, position: int, *, beam: int = 0) -> Any:
        logits = self._rows[beam][position]
        if self._dense:
            return logits.numpy()
        top = logits.topk(min(64, len(logits)))
        return top.indices.numpy(), top.values.numpy()

    async def crop(self, length: int, *, beam: int = 0) -> None:
        for cache in self._caches[beam]:
            cache.crop(length)

    async def reorder(self, parents: list[int]) -> None:
        caches = []
        for parent in parents:
            source, copies = self._caches[parent], self._fresh()
            for mine, other in zip(copies, source, strict=True):
                mine.take(other, 0, other.length)
            caches.append(copies)
        self._caches = caches
        self._rows = [dict(self._rows[parent]) for parent in parents]

    async def finish(self) -> None:
        return None
