"""A step of one session, and the bookkeeping of packing several into one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tallystick_model.canonical.batch import Placed
from tallystick_model.canonical.cache import KvCache
from tallystick_model.canonical.packing import Part
from tallystick_model.replay import ReplayCache
from tallystick_model.stock import StockCache

Cache = KvCache | StockCache | ReplayCache


@dataclass(slots=True)
class Segment:
    """Consecutive rows of one session.

    cache: the session's, from `new_cache` of this span; None for a one-shot bidirectional segment.
    first: position of the first row; for causal models what the cache holds already.
    rows: token ids (n,) int64 on the first span, else hidden rows (n, width) fp32.
    wanted: rows of this segment, ascending, whose logits the last span returns; None for all. No meaning elsewhere.
    token_types: (n,) int64 for models with segment embeddings, on the first span.
    """

    cache: Cache | None
    first: int
    rows: torch.Tensor
    wanted: Sequence[int] | None = None
    token_types: torch.Tensor | None = None

    def __len__(self) -> int:
        return int(self.rows.shape[0])


def wanted_in(segment: Segment, part: Part) -> list[int]:
    """Rows of the part, counted from its first, whose logits are wanted."""
    rows = range(len(segment)) if segment.wanted is None else segment.wanted
    return [row - part.first for row in rows if part.first <= row < part.last]


def only_last(segments: Sequence[Segment], parts: list[Part], wanted: list[list[int]]) -> list[list[int]]:
    """Of the wanted rows of each part those that are the last of their segment."""
    ends = [len(segments[part.segment]) == part.last for part in parts]
    return [
        rows[-1:] if end and rows[-1:] == [len(part) - 1] else []
        for rows, end, part in zip(wanted, ends, parts, strict=True)
    ]


def offset_rows(parts: list[Part], wanted: list[list[int]]) -> list[int]:
    flat, offset = [], 0
    for part, rows in zip(parts, wanted, strict=True):
        flat += [offset + row for row in rows]
        offset += len(part)
    return flat


def place(segments: Sequence[Segment], parts: list[Part]) -> list[Placed]:
    placed, offset = [], 0
    for part in parts:
        segment = segments[part.segment]
        cache = segment.cache if isinstance(segment.cache, KvCache) else None
        placed.append(Placed(cache, segment.first + part.first, offset, offset + len(part)))
        offset += len(part)
    return placed


def token_types_of(segments: Sequence[Segment], parts: list[Part]) -> torch.Tensor | None:
    if all(segment.token_types is None for segment in segments):
        return None
    return torch.cat(
        [
            torch.zeros(len(part), dtype=torch.int64) if (types := segments[part.segment].token_types) is None
            else types[part.first : part.last]
            for part in parts
        ]
    )  # fmt: skip


def cut(rows: torch.Tensor, parts: list[Part]) -> list[torch.Tensor]:
    return list(rows[: sum(len(part) for part in parts)].split([len(part) for part in parts]))


def whole_or_rows(index: int, segment: Segment) -> list[Part]:
    """A segment as one part; behind a recurrent state, as transformers' generate does, a part for each row."""
    if segment.first and isinstance(segment.cache, StockCache) and segment.cache.recurrent:
        return [Part(index, row, row + 1) for row in range(len(segment))]
    return [Part(index, 0, len(segment))]


def roll_back(cache: Cache, length: int) -> None:
    """Take a failed step back; where the architecture cannot, the session is lost."""
    if isinstance(cache, StockCache):
        try:
            cache.crop(length)
        except RuntimeError:
            cache.lost = True
    else:
        cache.commit(max(length, cache.length))
        cache.crop(length)
