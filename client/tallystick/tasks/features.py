"""Features: a text's hidden states, or one vector of them, pooled as the checkpoint's own files say."""

from __future__ import annotations

from typing import Literal

import numpy as np

from tallystick.tasks.backend import Answers, Backend, look_up
from tallystick.tasks.options import checked
from tallystick.tasks.passes import analyse, one_pass
from tallystick.verdict import Policy
from tallystick_protocol.errors import ConfigError
from tallystick_protocol.manifest import Pooling

Mode = Literal["model", "mean", "cls", "none"]


@checked
async def feature_extraction(
    backend: Backend,
    text: str,
    *,
    model: str = "",
    pooling: Mode = "model",
    normalize: bool | None = None,
    truncate: bool = False,
    dimensions: int | None = None,
    verify: Policy = "audit",
) -> Answers[np.ndarray]:
    """One array: (width,) float32, or with pooling="none" the hidden states of all positions (tokens, width).

    pooling: "model" pools and normalises as the checkpoint says (sentence-transformers' modules). normalize: to
    length 1, or not, whatever the checkpoint says. dimensions: keep the first so many values, for models trained for
    that. Raises ConfigError, ContextLengthExceeded.
    """
    served = await look_up(backend, model, ("hidden",), "features; use an encoder model")
    manifest = served.manifest
    if manifest.causal and pooling != "none":
        raise ConfigError(f'{manifest.name} is causal and names no pooling: use pooling="none"')
    if dimensions is not None and not 0 < dimensions <= manifest.width:
        raise ConfigError(f"dimensions={dimensions} is not from 1 to {manifest.width}")
    rows, route, verdict = await one_pass(backend, served, analyse(served, text, None, truncate), None, verify)
    if pooling == "none":
        return Answers([rows[:, :dimensions]], route, verdict)
    how = manifest.pooling or Pooling("mean", False)
    vector = pool(rows, how.mode if pooling == "model" else pooling)[:dimensions]
    if how.normalize and pooling == "model" if normalize is None else normalize:
        vector = to_unit_length(vector)
    return Answers([vector.astype(np.float32)], route, verdict)


def pool(rows: np.ndarray, mode: str) -> np.ndarray:
    """Rows (tokens, width) as one vector: their mean, or the first one ("cls")."""
    if mode not in ("mean", "cls"):
        raise ConfigError(f'pooling={mode!r} is not one of "model", "mean", "cls", "none"')
    return np.asarray(rows.mean(axis=0) if mode == "mean" else rows[0])


def to_unit_length(vector: np.ndarray) -> np.ndarray:
    """The vector, scaled to Euclidean length 1; zeros stay zeros."""
    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-12))
