"""Plans give the bits of the model's own forward, whoever travels with whom, and are made for every family that shares
calls."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch.utils._pytree import tree_flatten

from harness.in_memory import InMemory
from integration.test_canonical_families import SHARING, made, some_ids
from tallystick_model.canonical.joining import joinable
from tallystick_model.canonical.kernels import CanonicalLinear
from tallystick_model.canonical.recording import Step, Value
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
    for joins in (False, False, True, True):
        if joins:
            assert all(join() for span in spans for join in span.joins())
        again = [texts(spans[0])] if family in ENCODERS else [steps(spans, 0)]
        for one, other in zip(found, again, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("numerics", ["fp32", "bf16w"])
def test_products_of_the_same_rows_are_computed_in_one_call(
    numerics: Numerics, monkeypatch: pytest.MonkeyPatch
) -> None:
    span = made("Llama", numerics).cut()[0]
    products = [one for one in span._spliced.skeleton.model.modules() if isinstance(one, CanonicalLinear)]
    plain = [one.plain_weight() for one in products]
    assert span.joins() == []  # they are found in plans
    assert span.prepare()
    joins = span.joins()
    assert len(joins) == 2 * len(span.span)  # queries, keys and values; gate and up projection
    assert all(join() for join in joins)
    assert span.joins() == []
    assert any(one.within for one in products)
    assert all(one.within is None or not one.weight.numel() for one in products)
    assert all(torch.equal(one.plain_weight(), weight) for one, weight in zip(products, plain, strict=True))
    called: list[int] = []
    counted = CanonicalLinear.direct.fget
    monkeypatch.setattr(CanonicalLinear, "direct", property(lambda one: called.append(id(one)) or counted(one)))
    cache = span.new_cache(64)
    for at in range(2):
        span.forward([Segment(cache, at, some_ids(1, 0))])
    in_joints = [id(one.within[0]) for one in products if one.within]
    assert sorted(set(in_joints) & set(called)) == sorted(set(in_joints))
    assert len(called) == len(set(called))  # each stands once in the list of calls
    assert not {id(one) for one in products if one.within} & set(called)


def test_a_product_that_meets_other_rows_elsewhere_is_left_alone() -> None:
    one, two, three = (CanonicalLinear(torch.randn(32, 64), None) for _ in range(3))
    function = CanonicalLinear.forward.__wrapped__  # type: ignore[attr-defined]
    spec = tree_flatten(((one, torch.zeros(1)), {}))[1]

    def step(linear: CanonicalLinear, rows: int, out: int) -> Step:
        return Step(function, [linear, Value(rows)], spec, [out], False, None)

    assert joinable([[step(one, 0, 1), step(two, 0, 2)]]) == [[one, two]]
    assert joinable([[step(one, 0, 1), step(two, 0, 2), step(one, 2, 3), step(two, 2, 4)]]) == [[one, two]]
    assert joinable([[step(one, 0, 1), step(two, 0, 2)], [step(one, 0, 1), step(three, 0, 2)]]) == []
    assert joinable([[step(one, 0, 1), step(two, 0, 2), step(three, 1, 3)]]) == [[one, two]]


def test_what_runs_row_by_row_has_no_plan() -> None:
    assert not made("BLOOM").cut()[0].prepare()
