"""The k largest logits of each row, in one order that every machine agrees on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tallystick_protocol.errors import CorruptResult


def top_k(logits: torch.Tensor, k: int) -> tuple[Any, Any]:
    """logits (n, vocab) fp32 -> ids (n, k) int32 and values (n, k) fp32: by value descending, then id ascending.

    Raises CorruptResult for NaN. Cost: one selection of k values, no sort of the vocabulary.
    """
    rows, vocab = logits.shape
    if not 0 < k <= vocab:
        raise ValueError(f"the top {k} of {vocab}")
    scores = logits.numpy(force=True)
    ids = np.empty((rows, k), dtype=np.int32)
    for row in range(rows):
        ids[row] = _chosen(scores[row], k)
    return ids, np.take_along_axis(scores, ids, 1) + np.float32(0)


def as_pairs(ids: Any, values: Any) -> Any:
    """What `top_k` found as rows travel: (n, k, 2) little-endian uint32, each id and the bits of its value."""
    pairs = np.empty((*ids.shape, 2), dtype="<u4")
    pairs[:, :, 0], pairs[:, :, 1] = ids, values.view(np.uint32)
    return pairs


def _chosen(scores: Any, k: int) -> Any:
    """The k ids. At least k scores reach the k-th largest of some groups' maxima, few others do: these are sorted."""
    groups = max(4 * k, 256)
    grouped = len(scores) - len(scores) % groups
    largest = scores[:grouped].reshape(-1, groups).max(axis=0) if grouped else scores  # NaN where one is NaN
    if np.isnan(largest).any() or np.isnan(scores[grouped:]).any():
        raise CorruptResult("logits hold NaN")
    ids = np.flatnonzero(scores >= np.partition(largest, len(largest) - k)[len(largest) - k])
    return ids[np.argsort(-scores[ids], kind="stable")[:k]]
