"""The transformer of "Attention Is All You Need" (https://arxiv.org/abs/1706.03762), its formulas in NumPy, float64.

Weights go by the names that a Marian checkpoint has for them. Marian lays the positions out in halves, all sines and
then all cosines, where the paper (section 3.5) alternates them: a permutation of the same numbers.
"""

from __future__ import annotations

import numpy as np

Weights = dict[str, np.ndarray]


def positions(length: int, width: int) -> np.ndarray:
    """Section 3.5: PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i+1) = cos(the same); here [sines | cosines]."""
    angles = np.arange(length)[:, None] / 10000.0 ** (np.arange(0, width, 2) / width)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def attention(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, allowed: np.ndarray | None) -> np.ndarray:
    """Equation 1: softmax(Q K^T / sqrt(d_k)) V. allowed: which keys (columns) a query (row) may look at."""
    scores = queries @ keys.T / np.sqrt(queries.shape[-1])
    if allowed is not None:
        scores = np.where(allowed, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ values


def multi_head(
    weights: Weights, name: str, rows: np.ndarray, source: np.ndarray, heads: int, allowed: np.ndarray | None = None
) -> np.ndarray:
    """Section 3.2.2: Concat(head_1, …, head_h) W^O, head_i = Attention(Q W_i^Q, K W_i^K, V W_i^V)."""
    parts = [linear(weights, f"{name}.{letter}_proj", x) for letter, x in (("q", rows), ("k", source), ("v", source))]
    queries, keys, values = (np.split(part, heads, axis=-1) for part in parts)
    joined = np.concatenate(
        [attention(q, k, v, allowed) for q, k, v in zip(queries, keys, values, strict=True)], axis=-1
    )
    return linear(weights, f"{name}.out_proj", joined)


def feed_forward(weights: Weights, name: str, rows: np.ndarray) -> np.ndarray:
    """Equation 2: FFN(x) = max(0, x W_1 + b_1) W_2 + b_2."""
    return linear(weights, f"{name}.fc2", np.maximum(0.0, linear(weights, f"{name}.fc1", rows)))


def linear(weights: Weights, name: str, rows: np.ndarray) -> np.ndarray:
    return rows @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(weights: Weights, name: str, rows: np.ndarray) -> np.ndarray:
    """Section 3.1: LayerNorm(x + Sublayer(x)); https://arxiv.org/abs/1607.06450."""
    centred = rows - rows.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def embed(weights: Weights, ids: list[int]) -> np.ndarray:
    """Section 3.4: embeddings times sqrt(d_model), plus positions."""
    table = weights["model.shared.weight"]
    return table[ids] * np.sqrt(table.shape[1]) + positions(len(ids), table.shape[1])


def encode(weights: Weights, ids: list[int], layers: int, heads: int) -> np.ndarray:
    """Figure 1, left: the encoder's last hidden states (n, width)."""
    rows = embed(weights, ids)
    for layer in range(layers):
        name = f"model.encoder.layers.{layer}"
        rows = norm(
            weights, f"{name}.self_attn_layer_norm", rows + multi_head(weights, f"{name}.self_attn", rows, rows, heads)
        )
        rows = norm(weights, f"{name}.final_layer_norm", rows + feed_forward(weights, name, rows))
    return rows


def decode(weights: Weights, ids: list[int], memory: np.ndarray, layers: int, heads: int) -> np.ndarray:
    """Figure 1, right: the logits (n, vocab); a position looks at itself, at those before it, and at the memory."""
    rows = embed(weights, ids)
    before = np.tril(np.ones((len(ids), len(ids)), dtype=bool))
    for layer in range(layers):
        name = f"model.decoder.layers.{layer}"
        own = multi_head(weights, f"{name}.self_attn", rows, rows, heads, before)
        rows = norm(weights, f"{name}.self_attn_layer_norm", rows + own)
        cross = multi_head(weights, f"{name}.encoder_attn", rows, memory, heads)
        rows = norm(weights, f"{name}.encoder_attn_layer_norm", rows + cross)
        rows = norm(weights, f"{name}.final_layer_norm", rows + feed_forward(weights, name, rows))
    return rows @ weights["model.shared.weight"].T + weights["final_logits_bias"][0]
