"""Contrastive search (Su et al. 2022, arXiv:2202.06417), which transformers 5 keeps outside of itself.

Of the top_k likeliest tokens v it takes the one with the largest (1 - alpha) p(v) - alpha max_j cos(h_v, h_j): h_v is
the last hidden state that v would have, h_j those of the tokens before it. A `custom_generate` for any causal model of
transformers, ours included; through the network each step runs all top_k candidates' whole sequences.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from tallystick_protocol.errors import ConfigError


@torch.no_grad()
def contrastive_search(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> torch.Tensor:
    """The ids (batch, length) that contrastive search gives; alpha and k: penalty_alpha and top_k of the config.

    Raises ConfigError for what it does not give besides ids (return_dict_in_generate).
    """
    if generation_config.return_dict_in_generate:
        raise ConfigError("contrastive search returns ids alone: leave return_dict_in_generate out")
    alpha, count = float(generation_config.penalty_alpha), int(generation_config.top_k)
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    unfinished = torch.ones(len(input_ids), dtype=torch.bool)
    pad = generation_config._pad_token_tensor
    logits, hidden = _last(model, input_ids, mask)
    while bool(unfinished.any()):
        scores = logits_processor(input_ids, logits)
        likely, candidates = F.softmax(scores, dim=-1).topk(count, dim=-1)
        longer = torch.cat([input_ids.repeat_interleave(count, 0), candidates.reshape(-1, 1)], dim=1)
        longer_mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        next_logits, next_hidden = _last(model, longer, longer_mask.repeat_interleave(count, 0))
        similar = F.cosine_similarity(next_hidden[:, -1:], hidden.repeat_interleave(count, 0), dim=-1)
        similar = similar.masked_fill(mask.repeat_interleave(count, 0) == 0, -1.0).amax(dim=-1).view(-1, count)
        chosen = ((1 - alpha) * likely - alpha * similar).argmax(dim=-1)
        tokens = candidates.gather(1, chosen[:, None])[:, 0]
        if pad is not None:
            tokens = torch.where(unfinished, tokens, pad)
        picked = torch.arange(len(input_ids)) * count + chosen
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
        mask, logits, hidden = longer_mask, next_logits[picked], next_hidden[picked]
        if streamer is not None:
            streamer.put(tokens.cpu())
        unfinished = unfinished & ~stopping_criteria(input_ids, None)
    if streamer is not None:
        streamer.end()
    return input_ids


def _last(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (rows, vocab) of the last column, and the last hidden states (rows, columns, width)."""
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    out = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True, use_cache=False,
        logits_to_keep=1,
    )  # fmt: skip
    return out.logits[:, -1].float(), out.hidden_states[-1]
