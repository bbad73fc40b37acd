"""Plans give the bits of the model's own forward, whoever travels with whom, and are made for every family that shares
calls."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from harness.in_memory import InMemory
from integration.test_canonical_families import SHARING, made, some_ids
from tallystick_model.segments import Segment
from tallystick_model.span import SpanModel
from tallystick_protocol.manifest import Numerics

DAILY: list[tuple[str, Numerics]] = [("Llama", "bf16w"), ("GPT-2", "fp32"), ("Qwen3-MoE", "fp32"), ("BERT", "fp32")]
NIGHTLY: list[tuple[str, Numerics]] = [(family, "fp32") for family in sorted(SHARING - {one for one, _ in DAILY[1:]})]
ENCODERS = ("BERT", "RoBERTa", "ModernBERT")
PLANNED = [*DAILY, *(pytest.param(*one, marks=pytest.mark.nightly) for one in [*NIGHTLY, ("GPT-OSS", "bf16w")])]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


def steps(spans: list[SpanModel], seed: int) -> list[torch.Tensor]:
    """What four sessions get in some calls of random company, with rows taken back in between."""
    drawn = random.Random(seed)
    caches = [[span.new_cache(512) for span in spans] for _ in range(4)]
    lengths, found = [0] * 4, []
    for _ in range(7):
        going = {one: drawn.choice([1, 1, 2, 9, 33]) for one in drawn.sample(range(4), drawn.randint(1, 4))}
        rows = [some_ids(400, one)[lengths[one] : lengths[one] + count] for one, count in going.items()]
        wanted = [sorted(drawn.sample(range(count), drawn.randint(0, count))) for count in going.values()]
        for index, span in enumerate(spans):
            segments = [
                Segment(caches[one][index], lengths[one], given, wanted=asked if span.is_last else None)
                for one, given, asked in zip(going, rows, wanted, strict=True)
            ]
            rows = span.forward(segments)
        found += rows
        for one, count in going.items():
            lengths[one] += count
            if drawn.random() < 0.2:
                lengths[one] -= min(count, 2)
                for cache in caches[one]:
                    if cache is not None:
                        cache.crop(lengths[one])
    return found


def texts(span: SpanModel) -> list[torch.Tensor]:
    """What an encoder makes of some texts, together and alone."""
    rows = [some_ids(count, count) for count in (1, 5, 60, 300)]
    return [
        out for calls in (rows, rows[1:], rows[3:]) for out in span.forward([Segment(None, 0, ids) for ids in calls])
    ]


@pytest.mark.parametrize(("family", "numerics"), PLANNED)
def test_plans_give_the_bits_of_the_models_own_forward(family: str, numerics: Numerics) -> None:
    model: InMemory = made(family, numerics)
    spans = model.cut() if family in ENCODERS else model.cut(1, 3)
    found = [texts(spans[0])] if family in ENCODERS else [steps(spans, 0)]
    assert all(span.prepare() for span in spans)
    for _ in range(2):
        again = [texts(spans[0])] if family in ENCODERS else [steps(spans, 0)]
        for one, other in zip(found, again, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_runs_row_by_row_has_no_plan() -> None:
    assert not made("BLOOM").cut()[0].prepare()
