"""What the zoo computes with: the demo checkpoint, and a tiny random Llama where many audits are wanted."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from harness import samples
from harness.in_memory import InMemory
from tallystick_devnet.demo import default_model
from tallystick_protocol.manifest import Numerics

TINY = LlamaConfig(
    vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=256, pad_token_id=None,
)  # fmt: skip


@cache
def demo(numerics: Numerics = "fp32") -> InMemory:
    """models/tallystick-demo: a trained Llama of six layers."""
    whole = LlamaForCausalLM.from_pretrained(default_model(), dtype=torch.float32, local_files_only=True)
    return _named(InMemory.of(whole, numerics))


@cache
def tiny(numerics: Numerics = "fp32") -> InMemory:
    """A random Llama of four layers."""
    return _named(InMemory(LlamaForCausalLM, TINY, numerics))


def _named(model: InMemory) -> InMemory:
    """A manifest without pieces has no id; norms are as wide as can be."""
    anything = ((0.0, 1e9),) * (model.manifest.layers + 1)
    model.manifest = replace(model.manifest, pieces=samples.manifest().pieces, norms=anything)
    return model
