"""How far the accused's output rows lie from those that were recomputed."""

from __future__ import annotations

from typing import Any

import numpy as np

from tallystick_protocol.sketching.thresholds import LogitsThresholds

INFINITE = float("inf")


def rows_error(theirs: Any, ours: Any, entered: Any) -> float:
    """rms over rows of |y - y'| / |y' - x|; rows (n, width). Rows to which the span adds nothing are left out.

    theirs: y, the accused's; ours: y'; entered: x, or zeros where what leaves is no sum with what entered.
    """
    y, own, x = (np.asarray(rows, dtype=np.float64) for rows in (theirs, ours, entered))
    added = np.linalg.norm(own - x, axis=1)
    apart = np.linalg.norm(y - own, axis=1)
    if bool((apart[added == 0] > 0).any()) or not bool(np.isfinite(apart).all()):
        return INFINITE
    counted = added > 0
    return float(np.sqrt(np.mean(np.square(apart[counted] / added[counted])))) if bool(counted.any()) else 0.0


def logits_error(ids: Any, values: Any, own: Any, tolerance: LogitsThresholds) -> float:
    """Top-k rows against recomputed logits, as a share of the tolerance: the largest of row, window and edge.

    ids, values: (n, k), the accused's; own: (n, vocab), recomputed.
    """
    logits, told = np.asarray(own, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if int(ids.max(initial=0)) >= logits.shape[1] or not bool(np.isfinite(told).all()):
        return INFINITE
    if any(len(set(row)) < len(row) for row in ids.tolist()):
        return INFINITE
    scale = np.maximum(logits.std(axis=1), np.finfo(np.float32).tiny)
    rows = np.sqrt(np.mean(np.square(told - np.take_along_axis(logits, ids.astype(np.int64), 1)), axis=1)) / scale
    left = logits.copy()
    np.put_along_axis(left, ids.astype(np.int64), -np.inf, 1)
    edges = np.maximum(left.max(axis=1) - told.min(axis=1), 0.0) / scale
    window = float(np.sqrt(np.mean(np.square(rows))))
    return max(float(rows.max()) / tolerance.row, window / tolerance.window, float(edges.max()) / tolerance.edge)


def dense_error(theirs: Any, own: Any, tolerance: LogitsThresholds) -> float:
    """As `logits_error`, of rows that hold every id's value."""
    ids = np.broadcast_to(np.arange(own.shape[1]), own.shape)
    return logits_error(ids, theirs, own, tolerance)
