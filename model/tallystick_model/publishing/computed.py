"""Weights that a checkpoint need not hold, because the model's class computes them: sinusoidal tables, zeros."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch

from tallystick_model.skeleton import BUILD_ERRORS, Skeleton

_FILLS = (0.25, -3.0)


def computed_weights(skeleton: Skeleton, missing: Iterable[str]) -> dict[str, torch.Tensor]:
    """Those of the missing weights that transformers itself leaves out of checkpoints, with the values it gives them.

    A value counts when the class's own initialisation gives it twice, from two different starts: what is drawn by
    chance, or left as it was, is missing indeed. A persistent buffer that a class makes of zeros is one, too.
    """
    model = skeleton.model
    patterns = [
        *(getattr(model, "_keys_to_ignore_on_load_missing", None) or ()),
        *(getattr(model, "_keys_to_ignore_on_save", None) or ()),
    ]
    found = {}
    for name in sorted(missing):
        if any(re.search(pattern, name) for pattern in patterns):
            tensor = _made(model, name)
            if tensor is not None:
                found[name] = tensor
    return found


def _made(model: Any, name: str) -> torch.Tensor | None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:  # `final_logits_bias` of BART and its kin: zeros until somebody trains it
        buffer = module._buffers[leaf]
        return torch.zeros(buffer.shape) if leaf == "final_logits_bias" else None
    results = []
    for fill in _FILLS:
        alone = copy.deepcopy(module).to_empty(device="cpu")
        with torch.no_grad():
            for tensor in alone.parameters(recurse=False):
                tensor.fill_(fill)
            try:
                model._init_weights(alone)
            except BUILD_ERRORS:
                return None
        results.append(alone.get_parameter(leaf).detach().float())
    return results[0] if torch.equal(*results) else None
