"""Drafts by a small model on this machine. Takes the extra tallystick[torch]."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tallystick_protocol.errors import ConfigError
from tallystick_protocol.sampling import Sampling, draw

LARGEST = 64
"""How many logits a draft is drawn from: as many as the network returns of a row."""


class DraftModel:
    """A causal language model with the served model's vocabulary, in a checkpoint folder of transformers.

    The weights are shared by what `coupled` gives; the cache is an answer's own.
    """

    def __init__(self, folder: Path | str, sampling: Sampling | None = None) -> None:
        """Raises ConfigError for a folder without such a model, one whose states cannot be rolled back, or no torch."""
        try:
            import torch
            from transformers import AutoModelForCausalLM
        except ImportError:
            raise ConfigError("a draft model takes torch and transformers: pip install 'tallystick[torch]'") from None
        self._torch: Any = torch
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ConfigError(f"there is no draft model in {folder}: {str(error)[:200]}") from None
        if model._is_stateful:
            raise ConfigError(f"the draft model in {folder} keeps recurrent states: take one with a cache of rows")
        self._model: Any = model.eval()
        config = model.config.get_text_config()
        self._vocab = config.vocab_size
        self._longest = getattr(config, "max_position_embeddings", None) or 1 << 22
        self._sampling = sampling or Sampling()
        self._held: list[int] = []
        self._cache: Any = None
        self._forget()

    def coupled(self, sampling: Sampling) -> DraftModel:
        """For one answer: draws with the noise of that answer's positions."""
        other = copy.copy(self)
        other._sampling = sampling
        other._forget()
        return other

    def propose(self, ids: Sequence[int], k: int) -> list[int]:
        """As `Drafter.propose`. The cache holds `ids` afterwards and none of the drafts."""
        known = list(ids)
        k = min(k, self._longest - len(known))
        if k <= 0 or max(known) >= self._vocab:
            return []
        if self._held != known[: len(self._held)] or len(self._held) >= len(known):
            self._forget()
        with self._torch.inference_mode():
            logits = self._feed(known[len(self._held) :])
            self._held, fed = known, 0
            drafts = [self._choose(logits, len(known))]
            while len(drafts) < k:
                logits = self._feed(drafts[-1:])
                fed += 1
                drafts.append(self._choose(logits, len(known) + len(drafts)))
            self._cache.crop(-fed)
        return drafts

    def _feed(self, ids: list[int]) -> Any:
        """Logits (vocab,) fp32 behind the last id."""
        out = self._model(self._torch.tensor([ids]), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1]

    def _choose(self, logits: Any, position: int) -> int:
        values, ids = logits.topk(min(LARGEST, logits.shape[-1]))
        return draw(ids.numpy(), np.asarray(values.numpy(), dtype=np.float32), self._sampling, position)

    def _forget(self) -> None:
        from transformers import DynamicCache

        self._held = []
        self._cache = DynamicCache(config=self._model.config)
        self._cache.activate_past_recording()
