"""A session without a network: what decides tokens feeds it as it feeds the real one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from harness.in_memory import Steps as Spans
from tallystick_model.ranking import top_k
from tallystick_model.span import SpanModel

K = 64


def row_of(ids: np.ndarray, logits: np.ndarray) -> bytes:
    """A top-k row."""
    pairs = np.empty(len(ids), dtype=[("id", "<u4"), ("value", "<f4")])
    pairs["id"], pairs["value"] = ids, logits
    return pairs.tobytes()


class InProcess:
    """Rows of a function, counted. `passes`: how many rows each step had."""

    def __init__(self, compute: Callable[[int, list[int]], list[bytes]], forget: Callable[[int], None]) -> None:
        """compute(first, ids): a top-k row for each id from position `first` on. forget: positions from one on."""
        self.ids: list[int] = []
        self.passes: list[int] = []
        self.taken_back: list[tuple[int, int]] = []
        self._compute, self._forget = compute, forget
        self._rows: list[bytes] = []

    async def feed(self, ids: list[int], want: Sequence[bool] | None = None) -> None:
        assert want is None or all(want)
        self._rows += self._compute(len(self.ids), ids)
        self.ids += ids
        self.passes.append(len(ids))

    async def result(self, position: int) -> bytes:
        return self._rows[position]

    async def drop(self, length: int) -> None:
        self.taken_back.append((length, len(self.ids)))
        self._forget(length)
        del self.ids[length:], self._rows[length:]


def of_spans(spans: list[SpanModel]) -> InProcess:
    """The canonical execution of a model, cached."""
    steps = Spans(spans)

    def compute(first: int, ids: list[int]) -> list[bytes]:
        assert steps.length == first
        found, values = top_k(steps.step(torch.tensor(ids)), K)
        return [row_of(a, b) for a, b in zip(found, values, strict=True)]

    def forget(length: int) -> None:
        for cache in steps.caches:
            assert cache is not None
            cache.crop(length)
        steps.length = length

    return InProcess(compute, forget)


def of_table(table: np.ndarray) -> InProcess:
    """A model whose logits (vocab, vocab, vocab) depend on the last two ids alone."""
    held: list[int] = []

    def compute(first: int, ids: list[int]) -> list[bytes]:
        assert len(held) == first
        rows = []
        for token in ids:
            held.append(token)
            logits = table[held[-2] if len(held) > 1 else 0, token]
            order = np.lexsort((np.arange(len(logits)), -logits))
            rows.append(row_of(order, logits[order]))
        return rows

    def forget(length: int) -> None:
        del held[length:]

    return InProcess(compute, forget)
