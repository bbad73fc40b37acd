"""Experts through transformers' interface: the same as its own loop over them, and a row's bits are its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from tallystick_model.canonical.experts import is_experts, pack_experts, use_tallystick_experts
from tallystick_model.canonical.scopes import CanonicalScope

EXPERTS, WIDTH, SLOTS = 5, 24, 2


def made(cls: Any, config: Any) -> Any:
    torch.manual_seed(0)
    config._experts_implementation = "eager"
    module = cls(config).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


CASES = {
    "Mixtral": lambda: made(
        MixtralExperts,
        transformers.MixtralConfig(hidden_size=WIDTH, intermediate_size=40, num_local_experts=EXPERTS),
    ),
    "GPT-OSS": lambda: made(
        GptOssExperts, transformers.GptOssConfig(hidden_size=WIDTH, intermediate_size=40, num_local_experts=EXPERTS)
    ),
}


def routed(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scores = torch.randn(count, EXPERTS).softmax(-1)
    shares, chosen = scores.topk(SLOTS, dim=-1)
    return torch.randn(count, WIDTH), chosen, shares


@pytest.mark.parametrize("family", sorted(CASES))
@torch.inference_mode()
def test_packed_experts_are_those_of_transformers_and_keep_a_rows_bits(family: str) -> None:
    plain = CASES[family]()
    packed = copy.deepcopy(plain)
    assert is_experts(packed)
    pack_experts(packed, "fp32")
    use_tallystick_experts(packed.config)
    scope = CanonicalScope(packed)
    assert all(parameter.device.type == "meta" for parameter in packed.parameters())
    rows, chosen, shares = routed(70)
    whole = scope(rows, chosen, shares)
    assert torch.allclose(whole, plain(rows, chosen, shares), atol=1e-5)
    for first, last in ((0, 1), (3, 5), (10, 60), (69, 70)):
        part = slice(first, last)
        assert torch.equal(scope(rows[part], chosen[part], shares[part]), whole[part])


@torch.inference_mode()
def test_a_slot_without_an_expert_adds_nothing() -> None:
    packed = CASES["Mixtral"]()
    pack_experts(packed, "fp32")
    use_tallystick_experts(packed.config)
    rows, chosen, shares = routed(6)
    expected = packed(rows, chosen[:, :1], shares[:, :1])
    chosen[:, 1] = EXPERTS
    assert torch.equal(packed(rows, chosen, shares), expected + 0.0)
