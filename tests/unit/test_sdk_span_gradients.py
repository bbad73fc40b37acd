"""Gradients through spans against those of the whole model in transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from harness import checkpoints
from tallystick_model.gradients import Adapter, SpanGradients
from tallystick_protocol.errors import BadTensor, ContextLengthExceeded

IDS = torch.arange(3, 40) * 7 % 320
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 12}
KINDS: dict[str, tuple[Any, Any, dict[str, Any], tuple[str, ...]]] = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {}, ("self_attn.q_proj", "mlp.down_proj")),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config, {}, ("attn.c_attn", "mlp.c_proj")),
    "mistral": (
        transformers.MistralForCausalLM, transformers.MistralConfig, {"sliding_window": 13}, ("self_attn.v_proj",)
    ),
    "gemma2": (
        transformers.Gemma2ForCausalLM, transformers.Gemma2Config, {"head_dim": 12, "sliding_window": 13},
        ("self_attn.q_proj",),
    ),
    "mixtral": (transformers.MixtralForCausalLM, transformers.MixtralConfig, MOE, ("self_attn.o_proj",)),
    "gpt_oss": (transformers.GptOssForCausalLM, transformers.GptOssConfig, MOE, ("self_attn.k_proj",)),
}  # fmt: skip


EVERY_TIME = ("llama", "gpt2", "gpt_oss")
"""Learned positions, Conv1D, experts, sinks and windows are in these; the others run with the nightly tests."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=() if kind in EVERY_TIME else pytest.mark.nightly) for kind in KINDS],
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[SpanGradients]]:
    """The whole model and three spans of it that were cut unevenly."""
    cls, config, changes, _ = KINDS[request.param]
    sizes = checkpoints.GPT2 if request.param == "gpt2" else checkpoints.SMALL
    folder = tmp_path_factory.mktemp("model")
    checkpoints.save(cls, config(**{**sizes, **checkpoints.ENDS, **changes}), folder, 0)
    whole = checkpoints.reference(folder, cls.__name__)
    spans = checkpoints.published(folder, tmp_path_factory.mktemp("pieces")).cut(1, 3)
    return whole.requires_grad_(False), [SpanGradients(span) for span in spans]


def adapters_of(passes: list[SpanGradients], targets: tuple[str, ...]) -> dict[str, Adapter]:
    torch.manual_seed(3)
    shapes = {name: shape for span in passes for name, shape in span.linears.items() if name.endswith(targets)}
    return {
        name: Adapter(torch.randn(4, inside) * 0.1, torch.randn(outside, 4) * 0.1)
        for name, (inside, outside) in shapes.items()
    }


def own(span: SpanGradients, adapters: dict[str, Adapter]) -> dict[str, Adapter]:
    return {name: adapter for name, adapter in adapters.items() if name in span.linears}


def through(passes: list[SpanGradients], rows: torch.Tensor, adapters: dict[str, Adapter], keep: int) -> list[Any]:
    """What enters each span, and at last what leaves the last one."""
    entered = [rows]
    for span in passes:
        entered.append(span.forward(entered[-1], own(span, adapters), keep if span.model.is_last else 0).rows)
    return entered


def reference_grads(whole: Any, embeds: torch.Tensor, adapters: dict[str, Adapter], weight: torch.Tensor) -> Any:
    """Logits, and gradients of sum(weight * logits of the last rows), by plain torch hooks on the whole model."""
    embeds = embeds.clone().requires_grad_()
    leaves = {n: Adapter(a.a.clone().requires_grad_(), a.b.clone().requires_grad_()) for n, a in adapters.items()}

    def hook(adapter: Adapter) -> Any:
        return lambda _, args, out: (
            out + torch.nn.functional.linear(torch.nn.functional.linear(args[0], adapter.a), adapter.b)
        )

    handles = [whole.get_submodule(n).register_forward_hook(hook(a)) for n, a in leaves.items()]
    logits = whole(inputs_embeds=embeds[None], use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    (weight * logits[-len(weight) :]).sum().backward()
    return logits.detach(), embeds.grad, leaves


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def test_soft_prompts_and_adapters_get_the_gradients_of_the_whole_model(case: Any) -> None:
    whole, passes = case
    adapters = adapters_of(passes, next(kind[3] for kind in KINDS.values() if kind[0] is type(whole)))
    embeds = whole.get_input_embeddings()(IDS)
    keep = 9
    torch.manual_seed(1)
    weight = torch.randn(keep, 320)
    logits, grad_in, leaves = reference_grads(whole, embeds, adapters, weight)
    entered = through(passes, embeds, adapters, keep)
    assert close(entered[-1], logits[-keep:])
    grad = weight
    for span, rows in reversed(list(zip(passes, entered, strict=False))):
        found = span.backward(rows, own(span, adapters), grad, keep if span.model.is_last else 0)
        assert found.rows is not None
        grad = found.rows
        for name, adapter in found.adapters.items():
            assert close(adapter.a, leaves[name].a.grad) and close(adapter.b, leaves[name].b.grad)
    assert close(grad, grad_in)


def test_hidden_states_are_those_of_the_whole_model(case: Any) -> None:
    whole, passes = case
    said = whole(IDS[None], output_hidden_states=True).hidden_states
    rows, states = IDS, []
    for span in passes:
        passed = span.forward(rows, {}, hidden="all")
        rows = passed.rows
        states += list(passed.hidden)
    assert len(states) == len(said)
    assert all(close(mine, theirs[0]) for mine, theirs in zip(states, said, strict=True))


def test_serving_goes_on_with_the_same_bits_after_a_backward_pass(case: Any) -> None:
    _, passes = case
    spans = [span.model for span in passes]
    before = checkpoints.Session(spans).step(IDS)
    entered = through(passes, IDS, {}, 0)
    passes[-1].backward(entered[-2], {}, torch.ones_like(entered[-1]))
    assert torch.equal(checkpoints.Session(spans).step(IDS), before)


def test_refuses_what_does_not_fit_the_span(case: Any) -> None:
    whole, passes = case
    width = whole.config.hidden_size
    first, middle = passes[0], passes[1]
    name, (inside, outside) = next(iter(middle.linears.items()))
    good = Adapter(torch.zeros(2, inside), torch.zeros(outside, 2))
    rows = torch.zeros(5, width)
    bad: list[tuple[Any, dict[str, Adapter], torch.Tensor, type[Exception]]] = [
        (rows * float("nan"), {}, rows, BadTensor),
        (rows, {}, rows * float("nan"), BadTensor),
        (rows, {}, rows[:3], BadTensor),
        (rows[:, :3], {}, rows, BadTensor),
        (rows, {"model.layers.0.nothing": good}, rows, BadTensor),
        (rows, {name: Adapter(good.b, good.a)}, rows, BadTensor),
        (rows, {name: Adapter(good.a * float("inf"), good.b)}, rows, BadTensor),
        (rows, {next(iter(first.linears)): good}, rows, BadTensor),
        (torch.zeros(5000, width), {}, rows, ContextLengthExceeded),
    ]
    for entering, adapters, grad, error in bad:
        with pytest.raises(error):
            middle.backward(entering, adapters, grad)
    with pytest.raises(BadTensor, match="nothing to differentiate"):
        first.backward(IDS, {}, torch.zeros(len(IDS), width))
    with pytest.raises(BadTensor, match="token ids run"):
        first.forward(torch.tensor([320]), {})


def test_a_first_span_with_ids_gives_gradients_of_its_adapters_alone(case: Any) -> None:
    _, passes = case
    first = passes[0]
    name = next(iter(first.linears))
    adapter = adapters_of([first], (name,))
    found = first.backward(IDS, adapter, torch.ones(len(IDS), first.model.manifest.width))
    assert found.rows is None and list(found.adapters) == [name]
