"""Parts of a span compute what spans of exactly their layers do, bit for bit, in company and alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers as hub

from harness.in_memory import SMALL, InMemory, Steps
from tallystick_model.parts import part_of, parts_agree, serves_parts, threads_agree
from tallystick_model.segments import Segment
from tallystick_model.span import SpanModel
from tallystick_protocol.errors import WrongLayers
from tallystick_protocol.types import Span

LOCAL = {"num_local_experts": 6, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "Llama": (hub.LlamaForCausalLM, hub.LlamaConfig, {}),
    "Mixtral": (hub.MixtralForCausalLM, hub.MixtralConfig, {**LOCAL, "sliding_window": 17}),
    "Gemma 3": (hub.Gemma3ForCausalLM, hub.Gemma3TextConfig, {"head_dim": 16, "sliding_window": 17}),
    "GPT-2": (hub.GPT2LMHeadModel, hub.GPT2Config, {"n_embd": 72, "n_layer": 4, "n_head": 6, "n_positions": 512}),
    "GPT-NeoX": (hub.GPTNeoXForCausalLM, hub.GPTNeoXConfig, {}),
    "BERT": (hub.BertForMaskedLM, hub.BertConfig, {}),
    "BLOOM": (hub.BloomForCausalLM, hub.BloomConfig, {"n_layer": 4, "n_head": 6}),
    "T5": (
        hub.T5ForConditionalGeneration, hub.T5Config,
        {"d_model": 72, "d_kv": 12, "d_ff": 100, "num_layers": 3, "num_heads": 6},
    ),
}  # fmt: skip
SHARING = ("Llama", "Mixtral", "Gemma 3", "GPT-2", "GPT-NeoX", "BERT")
IDS = torch.randint(20, 300, (40,), generator=torch.Generator().manual_seed(0))


def made(family: str) -> InMemory:
    cls, config, changes = FAMILIES[family]
    fields = set(vars(config()))
    small = {key: value for key, value in SMALL.items() if key in fields or key in config.attribute_map}
    return InMemory(cls, config(**{**small, **changes}))


@pytest.mark.parametrize("family", SHARING)
def test_a_part_gives_the_bits_of_a_span_of_its_layers(family: str) -> None:
    model = made(family)
    whole = model.load(Span(0, 4))
    assert serves_parts(whole) and parts_agree(whole) and parts_agree(model.load(Span(1, 4)))
    middle = model.load(Span(1, 3))
    chunks = [17, 1, 1, 21] if model.manifest.causal else [40]
    for cuts in ((1,), (3,), (1, 3)):
        spans = [Span(a, b) for a, b in itertools.pairwise([0, *cuts, 4])]
        exact = Steps([model.load(span) for span in spans]).steps(IDS, chunks)
        assert torch.equal(Steps([part_of(whole, span) for span in spans]).steps(IDS, chunks), exact)
    mixed = Steps([part_of(whole, Span(0, 1)), part_of(middle, Span(1, 2)), part_of(whole, Span(2, 4))])
    assert torch.equal(mixed.steps(IDS, chunks), exact)
    assert torch.equal(Steps([whole]).steps(IDS, chunks), exact)  # still itself


@pytest.mark.parametrize("family", SHARING)
def test_a_span_that_depends_on_the_number_of_threads_is_noticed(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    span, before, forward = made(family).load(Span(0, 4)), torch.get_num_threads(), SpanModel.forward
    torch.set_num_threads(2)
    try:
        assert threads_agree(span)
        monkeypatch.setattr(
            SpanModel, "forward", lambda *given: [row + torch.get_num_threads() * 1e-6 for row in forward(*given)]
        )
        assert not threads_agree(span)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_sessions_over_different_parts_take_turns_and_those_over_the_same_share_calls() -> None:
    model = made("Llama")
    whole = model.load(Span(0, 4))
    early, again, late = part_of(whole, Span(0, 2)), part_of(whole, Span(0, 2)), part_of(whole, Span(2, 4))
    alone = Steps([model.load(Span(0, 2))])
    rows = [alone.step(IDS[:9]), alone.step(IDS[9:10])]
    other = Steps([model.load(Span(0, 2))]).step(IDS[20:32])
    end = Steps([model.load(Span(2, 4))]).step(rows[0])
    one, two, three = early.new_cache(64), early.new_cache(64), late.new_cache(64)
    assert torch.equal(early.forward([Segment(one, 0, IDS[:9])])[0], rows[0])
    assert torch.equal(late.forward([Segment(three, 0, rows[0])])[0], end)
    together = again.forward([Segment(two, 0, IDS[20:32]), Segment(one, 9, IDS[9:10])])
    assert torch.equal(together[0], other) and torch.equal(together[1], rows[1])


def test_a_part_takes_the_cache_of_its_layers_alone() -> None:
    whole = made("Llama").load(Span(0, 4))
    parts = [part_of(whole, Span(1, end)).row_bytes for end in (2, 3, 4)]
    assert parts == [whole.row_bytes * layers // 4 for layers in (1, 2, 3)]
    assert part_of(whole, Span(0, 4)) is whole


@pytest.mark.parametrize("family", ["BLOOM", "T5"])
def test_models_that_share_no_calls_or_whose_first_layer_is_used_later_are_served_whole(family: str) -> None:
    span = made(family).cut()[0]
    assert not serves_parts(span) and not parts_agree(span)
    with pytest.raises(WrongLayers, match="as a whole") as raised:
        part_of(span, Span(span.span.start, span.span.end - 1))
    assert raised.value.fields == {"start": span.span.start, "end": span.span.end}


def test_layers_that_are_not_there_are_refused() -> None:
    middle = made("Llama").load(Span(1, 3))
    for span in (Span(0, 2), Span(2, 4), Span(0, 4), Span(3, 4)):
        with pytest.raises(WrongLayers, match=r"layers \[1, 3\)$"):
            part_of(middle, span)


def test_stock_execution_is_served_whole() -> None:
    assert not serves_parts(made("Llama").load(Span(0, 4), "stock"))


def test_parts_that_do_not_give_the_bits_of_the_whole_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made("Llama").load(Span(0, 4))
    enter = SpanModel._inputs

    def changed(part: SpanModel, *arguments: Any) -> Any:
        inputs, count = enter(part, *arguments)
        if len(part.span) < 4 and not part.is_first:
            part._spliced.passage.received = [1.001 * stream for stream in part._spliced.passage.received or []]
        return inputs, count

    monkeypatch.setattr(SpanModel, "_inputs", changed)
    assert not parts_agree(whole)
