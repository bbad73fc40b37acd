"""Fill-mask: what a masked-language model puts in the place of each mask."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from tallystick.tasks.backend import Answers, Backend, look_up
from tallystick.tasks.options import checked
from tallystick.tasks.passes import one_pass
from tallystick.tasks.processors import log_softmax
from tallystick.tokens import Tokens
from tallystick.verdict import Policy
from tallystick_protocol.errors import ConfigError

log = logging.getLogger(__name__)

MAX_CANDIDATES = 1 << 16


@checked
async def fill_mask(
    backend: Backend,
    text: str,
    *,
    model: str = "",
    top_k: int = 5,
    targets: Sequence[str] | str | None = None,
    verify: Policy = "audit",
) -> Answers[Any]:
    """[{"sequence", "score", "token", "token_str"}], the likeliest first; for several masks, a list of that for each.

    targets: only these words compete; one that is no single token counts by its first. Raises ConfigError for a text
    without a mask, an unknown target, or a model that fills none.
    """
    served = await look_up(backend, model, ("logits",), "what fills a mask")
    if served.manifest.causal:
        raise ConfigError(f"{served.manifest.name} is a model for {served.manifest.task}: use text_generation")
    tokens = served.tokens
    mask = tokens.special_token("mask")
    if mask is None:
        raise ConfigError(f"the tokenizer of {served.manifest.name} has no mask token")
    if not 0 < top_k <= MAX_CANDIDATES:
        raise ConfigError(f"top_k={top_k} is not from 1 to {MAX_CANDIDATES}")
    encoding = tokens.analyse(text)
    masked = [position for position, token in enumerate(encoding.ids) if token == tokens.id_of(mask)]
    if not masked:
        raise ConfigError(f"the text has no {mask}: write it where a word is missing")
    competing = None if targets is None else _target_ids(tokens, [targets] if isinstance(targets, str) else targets)
    rows, route, verdict = await one_pass(backend, served, encoding, masked, verify)
    filled = []
    for position, row in zip(masked, rows, strict=True):
        probabilities = np.exp(log_softmax(row).astype(np.float64))
        ids = np.arange(len(row)) if competing is None else np.array(competing)
        best = ids[np.argsort(-probabilities[ids], kind="stable")][:top_k]
        results = []
        for token in best.tolist():
            whole = [*encoding.ids[:position], token, *encoding.ids[position + 1 :]]
            results.append(
                {
                    "score": float(probabilities[token]),
                    "token": token,
                    "token_str": tokens.decode([token], special=True),
                    "sequence": tokens.decode(whole, special=len(masked) > 1),
                }
            )
        filled.append(results)
    return Answers(filled[0] if len(masked) == 1 else filled, route, verdict)


def _target_ids(tokens: Tokens, targets: Sequence[str]) -> list[int]:
    """The ids of some words, ascending. Raises ConfigError when a word is no token, nor begins with one."""
    found = set()
    for target in targets:
        known = tokens.id_of(target)
        if known is None:
            known = tokens.encode(target, special=False)[0]
            log.warning("%r is no single token: %r competes for it", target, tokens.token_of(known))
        found.add(known)
    if not found:
        raise ConfigError("targets is empty: name at least one word")
    return sorted(found)
