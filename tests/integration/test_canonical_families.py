"""The families that people use most: canonical is canonical, canonical is right, in fp32 and in bf16w.

Decoders that share calls between sessions, decoders that run row by row, encoders, and encoder-decoders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hub
from torch import nn

from harness.in_memory import SMALL, InMemory, Steps
from tallystick_model.segments import Segment
from tallystick_protocol.manifest import Numerics

COUNT = 44
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
LOCAL = {"num_local_experts": 6, "num_experts_per_tok": 2}
PAIR = {
    "d_model": 72, "encoder_layers": 3, "decoder_layers": 3, "encoder_ffn_dim": 100, "decoder_ffn_dim": 100,
    "encoder_attention_heads": 6, "decoder_attention_heads": 6, "decoder_start_token_id": 2,
}  # fmt: skip
GPT2 = {"n_embd": 72, "n_layer": 4, "n_head": 6, "n_positions": 512}

FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "Llama": (hub.LlamaForCausalLM, hub.LlamaConfig, {}),
    "Qwen2": (hub.Qwen2ForCausalLM, hub.Qwen2Config, {}),
    "Qwen2-MoE": (hub.Qwen2MoeForCausalLM, hub.Qwen2MoeConfig, {**MOE, "shared_expert_intermediate_size": 8}),
    "Qwen3": (hub.Qwen3ForCausalLM, hub.Qwen3Config, {"head_dim": 16}),
    "Qwen3-MoE": (hub.Qwen3MoeForCausalLM, hub.Qwen3MoeConfig, MOE),
    "Mistral": (hub.MistralForCausalLM, hub.MistralConfig, {"sliding_window": 17}),
    "Mixtral": (hub.MixtralForCausalLM, hub.MixtralConfig, {**LOCAL, "sliding_window": 17}),
    "Gemma 2": (hub.Gemma2ForCausalLM, hub.Gemma2Config, {"head_dim": 16, "sliding_window": 17}),
    "Gemma 3": (hub.Gemma3ForCausalLM, hub.Gemma3TextConfig, {"head_dim": 16, "sliding_window": 17}),
    "Phi": (hub.PhiForCausalLM, hub.PhiConfig, {}),
    "Phi-3": (hub.Phi3ForCausalLM, hub.Phi3Config, {}),
    "GPT-2": (hub.GPT2LMHeadModel, hub.GPT2Config, GPT2),
    "GPT-NeoX": (hub.GPTNeoXForCausalLM, hub.GPTNeoXConfig, {}),
    "GPT-OSS": (hub.GptOssForCausalLM, hub.GptOssConfig, {**LOCAL, "head_dim": 16, "sliding_window": 17}),
    "BLOOM": (hub.BloomForCausalLM, hub.BloomConfig, {"n_layer": 3, "n_head": 6}),
    "Mamba": (hub.MambaForCausalLM, hub.MambaConfig, {"num_hidden_layers": 2}),
    "BERT": (hub.BertForMaskedLM, hub.BertConfig, {}),
    "RoBERTa": (hub.RobertaForMaskedLM, hub.RobertaConfig, {}),
    "ModernBERT": (
        hub.ModernBertForMaskedLM, hub.ModernBertConfig,
        {"local_attention": 8, "layer_types": ["full_attention", "sliding_attention"] * 2},
    ),
    "T5": (
        hub.T5ForConditionalGeneration, hub.T5Config,
        {"d_model": 72, "d_kv": 12, "d_ff": 100, "num_layers": 3, "num_heads": 6},
    ),
    "BART": (hub.BartForConditionalGeneration, hub.BartConfig, PAIR),
    "Marian": (hub.MarianMTModel, hub.MarianConfig, {**PAIR, "decoder_vocab_size": 320}),
}
SHARING = frozenset(FAMILIES) - {"BLOOM", "Mamba", "T5", "BART", "Marian"}
DAILY = ("Llama", "Qwen3-MoE", "GPT-OSS", "GPT-2", "BERT", "BLOOM", "T5")
ROUNDED = [*DAILY, *(pytest.param(one, marks=pytest.mark.nightly) for one in sorted(set(FAMILIES) - set(DAILY)))]
TOLERANCE = {"Mamba": 1e-4}  # its prefill in transformers is another algorithm than its steps


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


def made(family: str, numerics: Numerics = "fp32") -> InMemory:
    cls, config, changes = FAMILIES[family]
    fields = set(vars(config()))
    small = {key: value for key, value in SMALL.items() if key in fields or key in config.attribute_map}
    if family == "Mamba":
        del small["intermediate_size"]  # made of the others
    return InMemory(cls, config(**{**small, **changes}), numerics)


def some_ids(count: int, seed: int) -> torch.Tensor:
    return torch.randint(20, 300, (count,), generator=torch.Generator().manual_seed(seed))


def logits_of_the_whole(model: InMemory, ids: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    inputs = {"input_ids": ids[None]}
    if model.anatomy.encoder_layers:
        inputs = {"input_ids": source[None], "decoder_input_ids": ids[None]}
    with torch.inference_mode():
        return model.whole(**inputs).logits[0]  # type: ignore[no-any-return]


def prefill(model: InMemory, ids: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """One canonical prefill, after every other way to the same rows was seen to give the same bits."""
    memory = model.encode(source) if model.anatomy.encoder_layers else None
    if memory is not None:
        assert torch.equal(model.encode(source, 1), memory)
    whole = Steps(model.cut(), memory).step(ids)
    assert bool(torch.isfinite(whole).all())
    if not model.manifest.is_causal(model.decoder):
        span = model.cut()[0]
        for first, second in ((ids, source), (source, ids)):
            together = span.forward([Segment(None, 0, first), Segment(None, 0, second)])
            assert torch.equal(together[0 if first is ids else 1], whole)
        assert torch.equal(Steps(model.cut(1)).step(ids), whole)
        return whole
    assert torch.equal(Steps(model.cut(1), memory).steps(ids[:20], [1] * 20), whole[:20])
    chunked = Steps(model.cut(), memory)
    assert torch.equal(chunked.steps(ids, [5, 1, 1, 12, 3, 2, 20]), whole)
    (span,) = chunked.spans
    mine, stranger = span.new_cache(512, memory), span.new_cache(512, memory)
    span.forward([Segment(mine, 0, ids[:9]), Segment(stranger, 0, ids[20:26])])
    segments = [Segment(stranger, 6, ids[26:29]), Segment(mine, 9, ids[9:16])]
    assert torch.equal(span.forward(segments)[1], whole[9:16])
    return whole


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_rows_are_the_same_bits_by_every_way_and_those_of_transformers(family: str) -> None:
    model = made(family)
    assert (model.anatomy.obstacles == ()) == (family in SHARING), model.anatomy.obstacles
    ids, source = some_ids(COUNT, 0), some_ids(11, 1)
    found = prefill(model, ids, source)
    expected = logits_of_the_whole(model, ids, source)
    assert ((found - expected).abs().max() / expected.std()).item() <= TOLERANCE.get(family, 1e-5)


@pytest.mark.parametrize("family", ROUNDED)
def test_bf16w_is_its_definition(family: str) -> None:
    """Linear modules and experts take, hold and return bf16 values and add up in fp64; all else is transformers'."""
    model = made(family, "bf16w")
    given = [(some_ids(COUNT, seed), some_ids(11, seed + 1)) for seed in (0, 2, 4)]
    plain = [logits_of_the_whole(model, *one) for one in given]
    found = [prefill(model, *one) for one in given]
    _emulate_bf16w(model.whole)
    equal = 0
    for mine, whole, one in zip(found, plain, given, strict=True):
        expected = logits_of_the_whole(model, *one)
        difference = ((mine - expected).square().mean(1) / expected.var()).sqrt()
        rounding = ((whole - expected).square().mean(1) / expected.var()).sqrt()
        equal += int((difference < 1e-5).sum())
        assert difference.mean() < rounding.mean()
        assert rounding.min() > 1e-4
    # Where a sum lies between two bf16 values, its last bit of fp32 decides, and rows that attend to it follow: all of
    # a decoder's where it was the encoder's.
    assert equal >= 3


def _emulate_bf16w(model: nn.Module) -> None:
    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.bfloat16().double()

    def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: (
            F.linear(rounded(x), rounded(weight), None if bias is None else rounded(bias)).bfloat16().float()
        )

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = linear(module.weight, module.bias)  # type: ignore[method-assign]
        elif type(module).__name__ == "Conv1D":
            module.forward = linear(module.weight.t(), module.bias)  # type: ignore[method-assign,union-attr,operator,arg-type]
        elif type(module) is nn.Embedding:
            module.weight.data = module.weight.data.bfloat16().float()
        elif type(module).__name__.endswith("Experts"):
            module.forward = _emulated_experts(module, linear)  # type: ignore[method-assign]


def _emulated_experts(module: Any, linear: Callable[..., Callable[[torch.Tensor], torch.Tensor]]) -> Any:
    def matrix(name: str, expert: int) -> Callable[[torch.Tensor], torch.Tensor]:
        weight = getattr(module, name)[expert]
        bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
        return linear(weight.t() if module.is_transposed else weight, bias)

    def forward(rows: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(rows)
        for row in range(len(rows)):
            for expert, share in zip(chosen[row].tolist(), shares[row], strict=True):
                inner = module._apply_gate(matrix("gate_up_proj", expert)(rows[row : row + 1]))
                out[row] += matrix("down_proj", expert)(inner)[0] * share
        return out

    return forward
