"""Mixture of experts, through transformers' experts interface: every expert's rows go through canonical products.

A row's part of an expert depends on the row alone, since the products do; the parts are added in the order in which
the router lists the experts, one after the other. Experts that no row chose are not touched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ExpertsInterface

from tallystick_model.canonical.kernels import CanonicalLinear
from tallystick_model.canonical.recording import whole
from tallystick_protocol.manifest import Numerics

NAME = "tallystick"
PROBE = "tallystick_probe"
"""The implementation for probing runs: shapes for products, and what comes between them."""

_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds experts behind the interface: weights stacked, (experts, out, in) or transposed."""
    names = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "num_experts")
    return all(hasattr(module, name) for name in names)


def use_tallystick_experts(config: Any) -> None:
    """Make the models of this config object call our experts."""
    config._experts_implementation = NAME


class ExpertProducts:
    """The products of a module's experts, packed: `up[e]` (also the gate's rows) and `down[e]`."""

    def __init__(self, module: Any, numerics: Numerics) -> None:
        self.up = _packed(module, "gate_up_proj" if module.has_gate else "up_proj", numerics)
        self.down = _packed(module, "down_proj", numerics)


def pack_experts(module: nn.Module, numerics: Numerics) -> None:
    """Pack a filled module's experts; their plain weights are freed."""
    module.__dict__["tallystick_experts"] = ExpertProducts(module, numerics)
    for name in _WEIGHTS:
        held = module._parameters.get(name)
        if held is not None:
            module._parameters[name] = nn.Parameter(torch.empty_like(held, device="meta"), requires_grad=False)


def _packed(module: Any, name: str, numerics: Numerics) -> list[CanonicalLinear]:
    weights = getattr(module, name).detach()
    biases = getattr(module, name + "_bias").detach() if module.has_bias else [None] * len(weights)
    turned = weights.transpose(1, 2) if module.is_transposed else weights
    return [
        CanonicalLinear(weight.contiguous(), bias, numerics=numerics)
        for weight, bias in zip(turned, biases, strict=True)
    ]  # fmt: skip


@whole()
def _experts(module: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> torch.Tensor:
    """hidden (n, width), experts (n, k) that each row goes to and their shares (n, k) -> (n, width)."""
    products: ExpertProducts = module.__dict__["tallystick_experts"]
    count, slots = top_k_index.shape
    parts = hidden_states.new_zeros(count, slots, hidden_states.shape[1])
    chosen = top_k_index.reshape(-1)
    for expert in sorted(set(chosen.tolist())):
        if not 0 <= expert < len(products.up):
            continue  # a slot that says "no expert"
        at = (chosen == expert).nonzero()[:, 0]
        rows, slot = at // slots, at % slots
        inner = products.up[expert](hidden_states[rows])
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        part = products.down[expert](inner)
        if module.has_post_expert_norm:
            part = module.post_expert_norm(part)
        parts[rows, slot] = part * top_k_weights[rows, slot, None]
    whole = parts[:, 0]
    for slot in range(1, slots):
        whole = whole + parts[:, slot]
    return whole


def _shapes(module: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> torch.Tensor:
    name = "gate_up_proj" if module.has_gate else "up_proj"
    width = getattr(module, name).shape[2 if module.is_transposed else 1]
    inner = hidden_states.new_empty(hidden_states.shape[0], width)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    part = hidden_states.new_empty(hidden_states.shape)
    if module.has_post_expert_norm:
        part = module.post_expert_norm(part)
    return (part * top_k_weights[:, :1]).to(hidden_states.dtype)


ExpertsInterface.register(NAME, _experts)
ExpertsInterface.register(PROBE, _shapes)
