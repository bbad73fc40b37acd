"""The last hop's rows across classes: results compared value by value, for the client holds them itself.

d is (claimed - recomputed) / scale over the claimed ids, the scale as the auditor states it. An id that the auditor's k
largest lack counts as their smallest value: it cannot be larger there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tallystick_protocol.sketching.statistic import quiet, rms

_PAIR = np.dtype([("id", "<u4"), ("value", "<f4")])


@dataclass(frozen=True, slots=True)
class Apart:
    """row: the largest root mean square of d in a row; window: over all rows; edge: how far the largest value of an id
    that only the auditor has lies above the smallest claimed one, in scales. num_rows: that were compared. quiet: as
    `statistic.quiet` says."""

    row: float
    window: float
    edge: float
    num_rows: int
    quiet: float


def compare(claimed: list[bytes], recomputed: list[bytes], scales: Any, ranked: bool) -> Apart:
    """Compare a window's results; empty rows were not wanted. ranked: top-k rows, else one value after the other.

    Infinite where rows differ in form, a value is not finite, or a scale is zero and the rows differ.
    """
    rows, edges = [], [0.0]
    for one, other, scale in zip(claimed, recomputed, scales, strict=True):
        if not one and not other:
            continue
        if len(one) != len(other):
            return Apart(np.inf, np.inf, np.inf, len(claimed), np.inf)
        away, edge = _ranked(one, other) if ranked else (_values(one) - _values(other), 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            square = float(np.mean(np.square(away / scale))) if np.any(away != 0) else 0.0
            edges.append(edge / float(scale) if edge > 0 else 0.0)
        rows.append(square)
    squares = np.nan_to_num(np.array(rows, dtype=np.float64), nan=np.inf, posinf=np.inf)
    worst = float(np.sqrt(squares.max(initial=0.0)))
    most = float(np.nan_to_num(max(edges), nan=np.inf, posinf=np.inf))
    return Apart(worst, rms(squares), most, len(rows), quiet(squares))


def scales_of(values: Any, is_ranking: bool) -> Any:
    """The scale of each row of results, (n, values) float32: the standard deviation of logits, in which a constant
    means nothing, or the root mean square of scores. (n,) float64."""
    squares = np.einsum("ij,ij->i", values, values, dtype=np.float64) / values.shape[1]
    means = values.mean(axis=1, dtype=np.float64) if is_ranking else 0.0
    return np.sqrt(np.maximum(squares - np.square(means), 0.0))


def _ranked(one: bytes, other: bytes) -> tuple[Any, float]:
    """Differences over the claimed ids, and how far the auditor's own ids lie above the smallest claimed value."""
    claimed, found = np.frombuffer(one, dtype=_PAIR), np.frombuffer(other, dtype=_PAIR)
    order = np.argsort(found["id"], kind="stable")
    ids = found["id"][order]
    at = np.minimum(np.searchsorted(ids, claimed["id"]), len(ids) - 1)
    known = ids[at] == claimed["id"]
    values, least = found["value"].astype(np.float64), float(found["value"].min())
    mine = claimed["value"].astype(np.float64)
    away = np.where(known, mine - values[order][at], np.maximum(mine - least, 0.0))
    lacking = values[~np.isin(found["id"], claimed["id"])]
    return away, float(lacking.max() - mine.min()) if len(lacking) else 0.0


def _values(row: bytes) -> Any:
    return np.frombuffer(row, dtype="<f4").astype(np.float64)
