"""The device thread: in any company, and however its prompts are cut, a session gets the rows that it gets alone.

Sessions feed, roll back, change their minds and leave, all at once, through one engine.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hub
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.in_memory import SMALL, InMemory
from integration.test_canonical_families import made
from tallystick_model.parts import part_of
from tallystick_model.segments import Segment
from tallystick_model.span import SpanModel
from tallystick_node.scheduling import engine as scheduling
from tallystick_node.scheduling.engine import Engine, Withdrawn
from tallystick_node.scheduling.threads import Threads
from tallystick_protocol.errors import BadPosition, Overloaded, Unreachable
from tallystick_protocol.manifest import Numerics
from tallystick_protocol.types import Span

LENGTH = 160
BUDGET = 32
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "Llama": (hub.LlamaForCausalLM, hub.LlamaConfig, {}),
    "Llama in bf16w": (hub.LlamaForCausalLM, hub.LlamaConfig, {}),
    "Qwen2-MoE": (
        hub.Qwen2MoeForCausalLM, hub.Qwen2MoeConfig,
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 8},
    ),
    "Gemma 2": (hub.Gemma2ForCausalLM, hub.Gemma2Config, {"head_dim": 16, "sliding_window": 17}),
    "GPT-2": (
        hub.GPT2LMHeadModel, hub.GPT2Config,
        {"vocab_size": 320, "n_embd": 72, "n_layer": 2, "n_head": 6, "n_positions": 512},
    ),
    "BLOOM": (hub.BloomForCausalLM, hub.BloomConfig, {"vocab_size": 320, "hidden_size": 72, "n_layer": 1, "n_head": 6}),
}  # fmt: skip
"""The last one shares no calls."""


@cache
def span_of(family: str) -> SpanModel:
    torch.set_num_threads(1)
    cls, config, changes = FAMILIES[family]
    small = {} if "vocab_size" in changes else {**SMALL, "num_hidden_layers": 2}
    numerics: Numerics = "bf16w" if family.endswith("bf16w") else "fp32"
    model = InMemory(cls, config(**{**small, **changes}), numerics=numerics)
    return model.load(model.decoder)


def new_cache(span: SpanModel, max_length: int = LENGTH) -> Any:
    return span.new_cache(max_length)


@dataclass
class Talk:
    """One session and what it does: (what, how many rows, after how many turns of the loop it changes its mind)."""

    payer: str
    acts: list[tuple[str, int, int]]
    ids: list[int] = field(default_factory=list)
    rows: list[tuple[list[int], int, torch.Tensor]] = field(default_factory=list)
    """What it got: all ids so far, the position of the first row, rows."""

    async def run(self, engine: Engine, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        kept = new_cache(engine.model)
        most = LENGTH if engine.model.packs else 9  # rows that go one by one take their time
        for what, count, patience in self.acts:
            if what == "crop":
                kept.crop(max(0, len(self.ids) - count))
                del self.ids[kept.length :]
                continue
            fresh = torch.randint(3, 320, (min(count, most, LENGTH - len(self.ids)),), generator=draw).tolist()
            if not fresh:
                return
            feeding = asyncio.create_task(engine.forward(Segment(kept, len(self.ids), torch.tensor(fresh)), self.payer))
            if what != "feed":
                for _ in range(patience):
                    await asyncio.sleep(0)
            if what == "leave":
                feeding.cancel()
                return
            if what == "withdraw":
                engine.withdraw(kept)
            try:
                rows = await feeding
            except Withdrawn:
                assert what == "withdraw"
                kept.crop(len(self.ids))
                continue
            self.ids += fresh
            self.rows.append((list(self.ids), len(self.ids) - len(fresh), rows))


ACTS = st.tuples(
    st.sampled_from(["feed"] * 6 + ["crop", "withdraw", "leave"]),
    st.sampled_from([1, 1, 1, 2, 5, 9, 17, 40, 70, 120]),
    st.integers(0, 30),
)
TALKS = st.lists(
    st.builds(Talk, payer=st.sampled_from("abc"), acts=st.lists(ACTS, min_size=1, max_size=7)), min_size=1, max_size=6
)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=4, deadline=None)
@given(talks=TALKS)
def test_rows_do_not_depend_on_the_company(family: str, talks: list[Talk]) -> None:
    company(family, talks)


@pytest.mark.nightly
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=100, deadline=None)
@given(talks=TALKS)
def test_rows_do_not_depend_on_any_of_many_companies(family: str, talks: list[Talk]) -> None:
    company(family, talks)


def company(family: str, talks: list[Talk]) -> None:
    span = span_of(family)
    for talk in talks:  # examples are run again
        talk.ids.clear()
        talk.rows.clear()

    async def all_at_once(engine: Engine) -> bool:
        going = asyncio.gather(*(talk.run(engine, seed) for seed, talk in enumerate(talks)))
        planned = await engine.run(span.prepare)  # in the midst of it, as nodes do
        await going
        return planned

    assert with_engine(span, all_at_once) == span.packs
    span._plans.clear()  # what follows is the model's own forward
    for talk in talks:
        for ids, first, rows in talk.rows:
            alone = span.forward([Segment(new_cache(span), 0, torch.tensor(ids))])[0]
            assert torch.equal(rows, alone[first:])


def with_engine(span: SpanModel, work: Any, step_rows: int = BUDGET) -> Any:
    engine = Engine(span, step_rows)
    try:
        return asyncio.run(work(engine))
    finally:
        engine.close()


def test_the_families_share_calls_as_the_page_says() -> None:
    assert [family for family in FAMILIES if not span_of(family).packs] == ["BLOOM"]


def test_a_long_prompt_delays_a_step_by_one_forward() -> None:
    span = span_of("Llama")

    async def work(engine: Engine) -> list[int]:
        ids = torch.arange(480) % 300 + 3
        short = new_cache(span)
        await engine.forward(Segment(short, 0, ids[:5]), "short")
        prompt = asyncio.create_task(engine.forward(Segment(new_cache(span, 512), 0, ids), "long"))
        waited = []
        for step in range(5):
            going = asyncio.create_task(
                engine.forward(Segment(short, 5 + step, ids[5 + step : 6 + step]), "short")
            )
            await asyncio.sleep(0)
            before = engine.meter.forwards  # when it waits already
            await going
            waited.append(engine.meter.forwards - before)
        assert not prompt.done()
        await prompt
        assert engine.meter.forwards >= 1 + 480 // BUDGET
        return waited

    assert max(with_engine(span, work)) <= 2  # the one in flight, and its own


def test_while_cores_are_taken_steps_wait_for_each_other_and_for_nobody_when_the_node_stops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scheduling, "MOST_S", 100.0)
    for name in ("GAP_S", "LAG_S", "RECENT_S"):
        monkeypatch.setattr(f"tallystick_node.scheduling.company.{name}", 100.0)
    span = span_of("Llama")
    ids = torch.arange(3, 12)

    async def work(engine: Engine) -> None:
        caches = [new_cache(span) for _ in range(4)]
        for cached in caches:  # these wait for nobody: so far no core is taken
            await engine.forward(Segment(cached, 0, ids[:5]), "a")
        monkeypatch.setattr(Threads, "cores_were_taken", property(lambda _: True))
        before = engine.meter.forwards
        steps = [asyncio.create_task(engine.forward(Segment(one, 5, ids[5:6]), "a")) for one in caches[:1]]
        await engine.run(lambda: None)  # other work lets nobody wait
        await steps[0]
        steps = [asyncio.create_task(engine.forward(Segment(one, one.length, ids[6:7]), "a")) for one in caches[:2]]
        rows = await asyncio.gather(*steps)
        assert engine.meter.forwards - before == 2
        assert torch.equal(rows[0], span.forward([Segment(new_cache(span), 0, ids[:7])])[0][6:])
        last = asyncio.create_task(engine.forward(Segment(caches[3], 5, ids[5:6]), "a"))
        await asyncio.sleep(0)
        await asyncio.to_thread(engine.close)
        with suppress(Unreachable):  # unless it was picked before it heard of the end; it waits for nobody either way
            await last

    with_engine(span, work)


async def at_once(engine: Engine, segments: list[Segment]) -> None:
    """Let all of them wait before any is begun."""
    begun, goes_on = threading.Event(), threading.Event()
    held = asyncio.create_task(engine.run(lambda: (begun.set(), goes_on.wait())))
    await asyncio.to_thread(begun.wait)
    going = [asyncio.create_task(engine.forward(one, "a")) for one in segments]
    await asyncio.sleep(0)
    goes_on.set()
    await asyncio.gather(held, *going)


def test_while_cores_are_taken_who_has_no_session_and_who_is_at_a_whole_model_travels_with_all_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Threads, "cores_were_taken", property(lambda _: True))
    encoder, whole = made("BERT").cut()[0], span_of("Llama")
    assert whole.is_first and whole.is_last

    async def forwards(engine: Engine, segments: list[Segment]) -> int:
        before = engine.meter.forwards
        await at_once(engine, segments)
        return engine.meter.forwards - before

    async def texts(engine: Engine) -> int:
        return await forwards(engine, [Segment(None, 0, torch.arange(3, 7)) for _ in range(8)])

    async def steps(engine: Engine) -> int:
        caches = [new_cache(whole) for _ in range(8)]
        await forwards(engine, [Segment(one, 0, torch.arange(3, 7)) for one in caches])
        return await forwards(engine, [Segment(one, one.length, torch.arange(3, 4)) for one in caches])

    assert with_engine(encoder, texts) == 1
    assert with_engine(whole, steps) == 1


def test_while_cores_are_taken_no_step_is_left_behind_for_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Threads, "cores_were_taken", property(lambda _: True))
    span = part_of(span_of("Llama"), Span(0, 1))

    async def work(engine: Engine) -> int:
        caches = [new_cache(span) for _ in range(9)]
        for one in caches[:8]:
            await engine.forward(Segment(one, 0, torch.arange(3, 7)), "a")
        steps = [Segment(one, 4, torch.arange(3, 4)) for one in caches[:8]]
        before = engine.meter.forwards
        await at_once(engine, [Segment(caches[8], 0, torch.arange(3, 60)), *steps])
        return engine.meter.forwards - before

    assert with_engine(span, work) == 3  # 57 rows of the prompt: 24 beside all steps, 32, and 1


def test_one_bad_session_does_not_fail_its_company() -> None:
    span = span_of("Llama")

    async def work(engine: Engine) -> None:
        good, bad = new_cache(span), new_cache(span)
        before = engine.load
        await engine.run(lambda: None)
        assert engine.load == before, "the node's own work says nothing of its pace"
        blocked = asyncio.create_task(engine.run(lambda: None))
        ids = torch.arange(3, 23)
        outcomes = await asyncio.gather(
            engine.forward(Segment(good, 0, ids), "a"),
            engine.forward(Segment(bad, 7, ids), "b"),
            return_exceptions=True,
        )
        await blocked
        assert torch.equal(outcomes[0], span.forward([Segment(new_cache(span), 0, ids)])[0])
        assert isinstance(outcomes[1], BadPosition)
        assert (good.length, bad.length) == (20, 0)

    with_engine(span, work)


def test_rows_that_waited_too_long_are_refused_and_so_is_what_waits_at_the_end() -> None:
    span = span_of("Llama")
    engine = Engine(span, BUDGET)

    async def work() -> None:
        kept = new_cache(span)
        with pytest.raises(Overloaded) as refused:
            await engine.forward(Segment(kept, 0, torch.arange(3, 23)), wait_s=-1.0)
        assert refused.value.fields["retry_after_s"] > 0
        assert kept.length == 0
        waiting: Coroutine[Any, Any, Any] = engine.forward(Segment(kept, 0, torch.arange(3, 23)))
        held = asyncio.create_task(waiting)
        await asyncio.sleep(0)
        assert engine.load.waiting_jobs == 1
        await asyncio.gather(held, return_exceptions=True)
        await asyncio.to_thread(engine.close)
        with pytest.raises(Unreachable):
            await engine.forward(Segment(kept, kept.length, torch.arange(3, 23)))

    asyncio.run(work())


def test_a_prompt_that_is_withdrawn_between_two_pieces_leaves_whole_pieces() -> None:
    span = span_of("Llama")

    async def work(engine: Engine) -> None:
        kept = new_cache(span, 512)
        prompt = asyncio.create_task(engine.forward(Segment(kept, 0, torch.arange(3, 303)), "a"))
        while kept.length == 0:
            await asyncio.sleep(0)
        engine.withdraw(kept)
        with pytest.raises(Withdrawn):
            await prompt
        assert kept.length % BUDGET == 0 and 0 < kept.length < 300
        assert engine.load.waiting_jobs == 0

    with_engine(span, work)
