"""Which weight belongs where is found by taint, and what has no rule is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from harness.checkpoints import BERT, GPT2, SMALL
from tallystick_model.anatomy import Anatomy, dissect
from tallystick_model.canonical.attention import AttentionPlan
from tallystick_model.canonical.masks import Mask, recognise
from tallystick_model.config import checkpoint_config
from tallystick_model.skeleton import build_skeleton
from tallystick_model.taint import Taint


def anatomy_of(config: Any, architecture: str) -> Anatomy:
    return dissect(build_skeleton(checkpoint_config(config.to_dict()), architecture))


def test_a_llama_is_embed_layers_and_head() -> None:
    anatomy = anatomy_of(transformers.LlamaConfig(**SMALL), "LlamaForCausalLM")
    assert anatomy.weights_of("embed") == ("model.embed_tokens.weight",)
    assert anatomy.weights_of("head") == ("lm_head.weight", "model.norm.weight")
    assert len(anatomy.weights_of("layer.3")) == 9
    assert (anatomy.output, anatomy.causal, anatomy.width, anatomy.obstacles) == ("logits", True, 72, ())


def test_a_tied_head_is_stored_with_the_embedding() -> None:
    anatomy = anatomy_of(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True), "LlamaForCausalLM")
    assert anatomy.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert anatomy.weights_of("head") == ("model.norm.weight",)


def test_gpt2_has_two_embeddings_in_front() -> None:
    anatomy = anatomy_of(transformers.GPT2Config(**GPT2), "GPT2LMHeadModel")
    assert anatomy.weights_of("embed") == ("transformer.wpe.weight", "transformer.wte.weight")


def test_berts_pooler_reaches_nothing_that_is_served() -> None:
    anatomy = anatomy_of(transformers.BertConfig(**BERT), "BertModel")
    assert anatomy.unused == ("pooler.dense.bias", "pooler.dense.weight")
    assert (anatomy.output, anatomy.causal) == ("hidden", False)
    assert not anatomy.weights_of("head")


def test_a_sliding_window_is_read_off_the_mask() -> None:
    anatomy = anatomy_of(transformers.MistralConfig(**SMALL, sliding_window=37), "MistralForCausalLM")
    assert anatomy.layers[0].attention == AttentionPlan(Mask(True, 37), 2, 12, 12)


@pytest.mark.parametrize(
    ("config", "architecture", "why"),
    [
        (
            transformers.BloomConfig(vocab_size=320, hidden_size=72, n_layer=2, n_head=6),
            "BloomForCausalLM",
            "interface",
        ),
    ],
    ids=["bloom"],
)
def test_a_model_without_a_canonical_rule_says_why(config: Any, architecture: str, why: str) -> None:
    anatomy = anatomy_of(config, architecture)
    assert why in anatomy.obstacles[0]


def test_a_model_of_full_size_is_dissected_without_its_memory() -> None:
    config = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=4, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256,
    )  # fmt: skip
    skeleton = build_skeleton(checkpoint_config(config.to_dict()), "LlamaForCausalLM")
    assert sum(weight.numel() for weight in skeleton.weights().values()) > 5e9
    assert all(weight.device.type == "meta" for weight in skeleton.weights().values())
    assert dissect(skeleton).width == 8192


def test_masks_are_recognised_and_others_refused() -> None:
    assert recognise(causal_mask_function) == Mask(True, None)
    assert recognise(bidirectional_mask_function) == Mask(False, None)
    assert recognise(sliding_window_causal_mask_function(4096)) == Mask(True, 4096)
    assert recognise(chunked_causal_mask_function(64, torch.zeros(1, dtype=torch.long))) == Mask(True, None, chunk=64)


def test_taint_follows_views_writes_and_mixes_with_real_tensors() -> None:
    one, other = torch.empty(4, 3, device="meta"), torch.empty(3, device="meta")
    taint = Taint({"one": one, "other": other}, skip=())
    with taint:
        mixed = torch.nn.functional.embedding(torch.tensor([1, 2]), one)
        written = torch.empty(2, 3, device="meta")
        written[:, :1] = other[:1]
        clean = torch.empty(2, device="meta") + torch.ones(2)
    assert taint.tags(mixed[0]) == {"one"}
    assert taint.tags(written) == {"other"}
    assert taint.tags(clean) == frozenset()
