"""The whole model in transformers, run the way the exam asks for: what spans are compared with."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache

from tallystick_model.skeleton import arguments_of
from tallystick_model.stock import is_recurrent


class Whole:
    """model: eval mode; seq2seq: whether it has an encoder; offset: the position of the first token.

    replayed: whether each step computes all rows again, without a cache. One session's cache at a time.
    """

    def __init__(
        self, model: Any, *, seq2seq: bool, causal: bool, offset: int | None = 0, replayed: bool = False
    ) -> None:
        self.replayed = replayed
        self.ids: Any = None
        self.model, self.seq2seq, self.causal = model, seq2seq, causal
        self.offset = 0 if seq2seq else offset
        self.memory: Any = None
        self.cache: Any = None
        self.length = 0

    def encode(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        encoder = self.model.get_encoder()
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        self.memory = encoder(**_known(encoder, inputs))
        found: torch.Tensor = self.memory.last_hidden_state
        return found

    def open(self) -> None:
        """A new session, with a cache where the model is causal."""
        self.length = 0
        self.cache = None
        self.ids = None
        if self.causal and not self.replayed:
            config = self.model.config
            self.cache = DynamicCache(config=config)
            if self.seq2seq:
                self.cache = EncoderDecoderCache(self.cache, DynamicCache(config=config))

    def step(self, ids: torch.Tensor, mask: torch.Tensor | None = None, memory_mask: Any = None) -> torch.Tensor:
        """ids (batch, n) behind those before; logits (batch, n, vocab) or hidden states."""
        count, before = ids.shape[1], self.length
        if before and count > 1 and self.cache is not None and is_recurrent(self.cache):
            return torch.cat([self.step(one, mask, memory_mask) for one in ids.split(1, dim=1)], dim=1)
        if self.replayed:
            self.ids = ids = ids if self.ids is None else torch.cat([self.ids[:, :before], ids], dim=1)
            self.length = 0
        output = self.model(**self.inputs(ids, mask, memory_mask))
        self.length = before + count
        logits = getattr(output, "logits", None)
        rows: torch.Tensor = output.last_hidden_state if logits is None else logits
        return rows[:, -count:]

    def inputs(self, ids: torch.Tensor, mask: torch.Tensor | None = None, memory_mask: Any = None) -> dict[str, Any]:
        """What transformers' generate hands the forward."""
        first = "decoder_" if self.seq2seq else ""
        total = self.length + ids.shape[1]
        inputs: dict[str, Any] = {f"{first}input_ids": ids, "use_cache": self.cache is not None}
        if mask is not None:
            inputs[f"{first}attention_mask"] = mask[:, :total]
            positions = (mask[:, :total].cumsum(1) - 1).clamp(min=0)[:, self.length :]
            inputs |= {f"{first}position_ids": positions} if self.causal else {}  # else numbered by the model itself
        elif self.length and self.offset is not None:  # behind cached rows some models count from 0 unless told
            inputs[f"{first}position_ids"] = torch.arange(self.length, total)[None] + self.offset
        if self.seq2seq:
            inputs |= {"encoder_outputs": self.memory, "attention_mask": memory_mask}
        if self.cache is not None:
            inputs |= {"past_key_values": self.cache, "cache_params": self.cache}
        return _known(self.model, inputs)

    def crop(self, length: int) -> None:
        if self.cache is not None:
            self.cache.crop(length - self.length)
        self.length = length


def _known(module: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    names = arguments_of(module)
    return {name: value for name, value in inputs.items() if name in names and value is not None}
