"""The k largest logits of each row, in one order that every machine agrees on."""

from __future__ import annotations

import torch

from tallystick_protocol.errors import CorruptResult


def top_k(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (n, vocab) fp32 -> ids (n, k) int32 and values (n, k) fp32: by value descending, then id ascending.

    Raises CorruptResult for NaN. Cost: one selection of k values, no sort of the vocabulary.
    """
    rows, vocab = logits.shape
    if not 0 < k <= vocab:
        raise ValueError(f"the top {k} of {vocab}")
    if bool(torch.isnan(logits).any()):
        raise CorruptResult("logits hold NaN")
    ids = torch.empty(rows, k, dtype=torch.int32)
    least = torch.topk(logits, k, dim=1).values[:, -1]
    for row in range(rows):
        ids[row] = _chosen(logits[row], least[row], k)
    return ids, logits.gather(1, ids.long()) + 0.0


def _chosen(logits: torch.Tensor, least: torch.Tensor, k: int) -> torch.Tensor:
    """Every id above the k-th value, and the smallest ids at it; nonzero() gives ids in ascending order."""
    above = (logits > least).nonzero()[:, 0]
    level = (logits == least).nonzero()[: k - len(above), 0]
    ids = torch.cat([above, level])
    ids = ids[torch.argsort(ids)]
    return ids[torch.argsort(logits[ids], descending=True, stable=True)].to(torch.int32)
