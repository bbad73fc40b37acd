"""Pieces of a segment: what one forward computes of it."""

from __future__ import annotations

from tallystick_model.replay import ReplayCache
from tallystick_model.segments import Cache, Segment
from tallystick_model.span import SpanModel
from tallystick_model.stock import StockCache


def divides(model: SpanModel, cache: Cache | None) -> bool:
    """Whether rows of a session may be computed in pieces.

    Canonical rows of causal models may, anywhere. A stock run is computed whole where pieces would cost more: behind a
    recurrent state rows go one by one, and without a cache all rows so far are computed for each piece.
    """
    if cache is None:
        return False
    if model.execution == "canonical":
        return True
    return not isinstance(cache, ReplayCache) and not (isinstance(cache, StockCache) and cache.recurrent)


def piece_of(model: SpanModel, segment: Segment, first: int, count: int) -> Segment:
    """Rows [first, first + count) of a segment, counted from its own first row."""
    last = first + count
    if first == 0 and last == len(segment):
        return segment
    types = segment.token_types
    wanted = segment.wanted
    if model.manifest.output == "label" and last < len(segment):
        wanted = ()  # which is the label of the last row alone
    elif wanted is not None:
        wanted = [row - first for row in wanted if first <= row < last]
    return Segment(
        segment.cache,
        segment.first + first,
        segment.rows[first:last],
        wanted,
        None if types is None else types[first:last],
    )
