"""Places and bytes: what sessions reserve is what they may come to take."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers as hub

from harness.in_memory import SMALL, InMemory
from tallystick_model.canonical.cache import CacheShape, KvCache
from tallystick_model.devices import CPU, Placement
from tallystick_model.segments import Segment
from tallystick_model.span import SpanModel
from tallystick_node.session.admission import Admission, row_bytes, session_bytes
from tallystick_protocol.errors import Overloaded
from tallystick_protocol.types import Address, SessionId, Span

CARD = torch.device("cuda", 0)


def split_model() -> SpanModel:
    """Three layers, two of them on an accelerator, one of those without a known shape."""
    shape = CacheShape(2, 8, 8)
    found = SimpleNamespace(
        span=Span(1, 4),
        causal=True,
        manifest=SimpleNamespace(width=32),
        placement=Placement(1, (CARD, CARD, CPU)),
        cache_shapes={1: shape, 3: shape},
    )
    return cast(SpanModel, found)


def name(number: int) -> SessionId:
    return SessionId(number.to_bytes(32, "big"))


def payer(number: int) -> Address:
    return Address(f"0x{number:040x}")


def test_every_device_has_a_budget_of_its_own() -> None:
    model = split_model()
    one = session_bytes(model, 100)
    assert one[CARD] == 112 * (128 + 8 * 32), "rows in sixteens, and the last tile's"
    assert one[CPU] == 100 * (4 * 32 + 200) + 112 * 128
    admission = Admission(model, 2 * one[CPU], 8, lambda: 7)
    admission.open(name(1), payer(1), 100, 0)
    assert admission.reserved_bytes == one.total() and admission.usage == 0.5
    admission.open(name(2), payer(2), 100, 1)
    with pytest.raises(Overloaded) as refused:
        admission.open(name(3), payer(3), 1, 2)
    assert refused.value.fields == {"retry_after_s": 7}
    admission.close(name(1))
    admission.close(name(1))
    with pytest.raises(Overloaded):
        admission.take_more(name(2), one[CPU] + 1)
    admission.take_more(name(2), one[CPU])
    admission.close(name(2))
    assert admission.reserved_bytes == 0


def test_places_end_before_memory_does() -> None:
    admission = Admission(split_model(), 1 << 30, 2, lambda: 1)
    admission.open(name(1), payer(1), 10, 1)
    with pytest.raises(Overloaded):
        admission.open(name(2), payer(2), 10, 2)


def test_one_payer_leaves_a_quarter_to_others_but_may_have_one_session_of_any_size() -> None:
    model = split_model()
    one = max(session_bytes(model, 100).values())
    admission = Admission(model, 8 * one, 100, lambda: 1)
    for number in range(6):
        admission.open(name(number), payer(1), 100, number)
    with pytest.raises(Overloaded, match="others may need"):
        admission.open(name(6), payer(1), 100, 6)
    admission.open(name(6), payer(2), 100, 6)
    admission.close(name(0))
    admission.open(name(7), payer(1), 100, 6)
    alone = Admission(model, one, 4, lambda: 1)
    alone.open(name(1), payer(1), 100, 0)
    places = Admission(model, 100 * one, 4, lambda: 1)
    for number in range(3):
        places.open(name(number), payer(1), 10, number)
    with pytest.raises(Overloaded, match="others may need"):
        places.open(name(3), payer(1), 10, 3)
    places.open(name(3), payer(2), 10, 3)


def test_what_is_only_kept_gives_way() -> None:
    model = split_model()
    kept = [name(1), name(2)]

    def evict() -> bool:
        if kept:
            admission.close(kept.pop(0))
            return True
        return False

    budget = max(session_bytes(model, 100).values())
    admission = Admission(model, 2 * budget, 8, lambda: 1, evict)
    for session in list(kept):
        admission.open(session, payer(1), 100, 0)
        admission.spare(session)
    assert admission.reserved_bytes == 0 and admission.kept_bytes == 2 * session_bytes(model, 100).total()
    with pytest.raises(Overloaded):
        admission.open(name(3), payer(3), 300, 0)  # which would not fit if all were given up
    assert len(kept) == 2
    admission.open(name(3), payer(3), 100, 0)
    assert kept == [name(2)]
    with pytest.raises(Overloaded):
        admission.open(name(4), payer(4), 180, 0)
    assert kept == []
    assert (admission.reserved_bytes, admission.kept_bytes) == (session_bytes(model, 100).total(), 0)


@pytest.mark.parametrize("length", [1, 61, 64, 200])
def test_a_cache_takes_no_more_than_was_reserved(length: int) -> None:
    torch.set_num_threads(1)
    model = InMemory(hub.LlamaForCausalLM, hub.LlamaConfig(**{**SMALL, "num_hidden_layers": 2}))
    span: Any = model.load(Span(0, 2))
    kept = span.new_cache(length)
    assert isinstance(kept, KvCache)
    for first in range(0, length, 23):
        span.forward([Segment(kept, first, torch.arange(3, 3 + min(23, length - first)))])
    aside = length * (4 * span.manifest.width + 200)
    assert kept.length == length and kept.size_bytes <= session_bytes(span, length)[CPU] - aside
    assert row_bytes(span) == span.row_bytes
