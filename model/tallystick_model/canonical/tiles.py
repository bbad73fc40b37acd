"""One attention tile: R query rows against the keys they may see, in a call whose shape the positions alone decide.

Plain scores go through `scaled_dot_product_attention`. Soft caps (Gemma 2) and sinks (GPT-OSS) are between the product
and the softmax; there the tile is computed step by step: the product with the keys, the softmax over them, and the
product with the values. Products are of at least two matrices side by side: one alone is split between threads, which
changes bits (docs/numerics.md); so a model with one head goes step by step, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tallystick_model.canonical.kernels import in_blocks

R = 4
"""Query rows per tile. Part of the numerics: another R gives other bits."""


@dataclass(frozen=True, slots=True)
class Scores:
    """How scores are made of products of queries and keys.

    scale: what they are multiplied by, None for 1/sqrt(key_dim); softcap: c in c tanh(score / c), None for none;
    sinks: (heads,), one more score of every head, which takes its share of the softmax and has no value.
    """

    scale: float | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


def folded(heads: int, groups: int, key_dim: int, value_dim: int, form: Scores) -> int:
    """How many heads travel as rows of one: those that share keys, where that leaves the bits alone."""
    return heads // groups if groups > 1 and key_dim == value_dim and _is_plain(heads, form) else 1


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, form: Scores
) -> torch.Tensor:
    """query (1, heads, R, key_dim), keys and values (1, groups, n, ...), mask (R, n) added to the scores or None.

    Folded: query (1, groups, folds * R, key_dim), mask (folds * R, n). Returns the query's shape, (..., value_dim).
    """
    heads, groups = query.shape[1], keys.shape[1]
    if not _is_plain(heads, form):
        return _stepwise(query[0], keys[0], values[0], mask, form)[None]
    out: torch.Tensor = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, scale=form.scale, enable_gqa=heads != groups
    )
    return out


def _is_plain(heads: int, form: Scores) -> bool:
    return form.softcap is None and form.sinks is None and heads > 1


def _stepwise(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, form: Scores
) -> torch.Tensor:
    heads, rows, dim = query.shape
    batch, num_keys = max(2, keys.shape[0]), keys.shape[1]
    if batch != keys.shape[0]:  # one group: its rows in two halves, so that two products run side by side
        keys, values = (held.expand(batch, *held.shape[1:]).contiguous() for held in (keys, values))
    scores = torch.bmm(query.reshape(batch, heads * rows // batch, dim), keys.transpose(1, 2)).view(heads, rows, -1)
    scores = scores * (dim**-0.5 if form.scale is None else form.scale)
    if form.softcap is not None:
        scores = in_blocks(torch.tanh, scores / form.softcap) * form.softcap
    if mask is not None:
        scores = scores + mask
    if form.sinks is not None:
        scores = torch.cat([scores, form.sinks.view(heads, 1, 1).expand(heads, rows, 1)], dim=-1)
    shares = scores.softmax(dim=-1)[..., :num_keys]
    shares = shares.reshape(batch, heads * rows // batch, num_keys)
    return torch.bmm(shares, values).view(heads, rows, values.shape[-1])
