"""The embedding's output, recomputed alone: what a first span answers challenges with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from harness.in_memory import SMALL, InMemory
from tallystick_model.segments import Segment
from tallystick_protocol.types import Span

IDS = torch.arange(3, 3 + 41)

MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SMALL)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=320, n_embd=72, n_layer=2, n_head=6, n_positions=128)),
    "bert": (
        BertModel,
        BertConfig(
            vocab_size=320, hidden_size=72, num_hidden_layers=2, num_attention_heads=6, intermediate_size=100,
            max_position_embeddings=128,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_what_enters_the_first_layer_is_found_again_from_the_ids_alone(name: str) -> None:
    made = InMemory(*MODELS[name])
    span = made.load(Span(0, 1))
    types = torch.arange(len(IDS)) % 2 if name == "bert" else None
    cache = span.new_cache(64) if span.causal else None
    entered, _ = span.rows_between(Segment(cache, 0, IDS, token_types=types))
    assert torch.equal(span.entering(IDS, 0, types), entered)
    if span.packs and span.causal:
        assert torch.equal(span.entering(IDS[32:], 32), entered[32:])
    again, _ = span.rows_between(Segment(span.new_cache(64) if span.causal else None, 0, IDS, token_types=types))
    assert torch.equal(again, entered), "nothing is left of having looked"
