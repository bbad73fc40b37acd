"""What a client demands of a receipt before it pays."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness import samples
from tallystick.checks import SignedOnce, Terms, agree, check_input, check_output, check_terms, same_work
from tallystick_protocol.errors import CorruptResult, LinkMismatch
from tallystick_protocol.messages import CLOCK_SKEW_S
from tallystick_protocol.receipts import Context, Receipt, leaf, merkle_root
from tallystick_protocol.types import ZERO32, Digest, SessionId, Span

WANT = (False,) * 31 + (True,)
CONTEXT = Context("fp32", "f32", 8, WANT)
NOW = 1_700_000_000
GOOD = samples.receipt(context=CONTEXT.digest())
TERMS = Terms(GOOD.node, samples.MODEL, samples.digest("class"), SessionId(samples.digest("session")), 0, Span(0, 2))


def check(receipt: Receipt, previous: Digest = ZERO32, now: int = NOW) -> None:
    check_terms(receipt, TERMS, previous, WANT, CONTEXT, now)


def test_a_receipt_that_says_what_was_agreed_passes() -> None:
    check(GOOD)
    check(replace(GOOD, revision=7, input=samples.digest("x"), output=samples.digest("y")))


@pytest.mark.parametrize(
    "changes",
    [{"node": samples.address("x")}, {"model": samples.digest("x")}, {"numeric_class": samples.digest("x")},
     {"session": samples.digest("x")}, {"attempt": 1}, {"start": 1}, {"end": 3}, {"previous": samples.digest("x")},
     {"challenge": samples.digest("x")}, {"sketches": samples.digest("x")}, {"context": samples.digest("x")}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_a_field_that_was_not_agreed_is_named(changes: dict[str, object]) -> None:
    with pytest.raises(CorruptResult, match=next(iter(changes))) as raised:
        check(replace(GOOD, **changes))  # type: ignore[arg-type]
    assert raised.value.fields == {"hop": TERMS.node}


def test_other_positions_are_refused() -> None:
    with pytest.raises(CorruptResult, match="other positions"):
        check(replace(GOOD, last=31))


def test_a_time_may_be_off_by_the_clock_skew_and_no_more() -> None:
    for now in (NOW - CLOCK_SKEW_S, NOW + CLOCK_SKEW_S):
        check(GOOD, now=now)
    for now in (NOW - CLOCK_SKEW_S - 1, NOW + CLOCK_SKEW_S + 1):
        with pytest.raises(CorruptResult, match="s off"):
            check(GOOD, now=now)


def test_the_first_hop_worked_on_what_the_client_sent() -> None:
    rows = [bytes([i]) * 4 for i in range(3)]
    receipt = samples.receipt(last=3, input=merkle_root([leaf(row) for row in rows]))
    check_input(receipt, None, rows)
    with pytest.raises(LinkMismatch) as raised:
        check_input(receipt, None, [*rows[:2], b"else"])
    assert raised.value.fields == {"hop": receipt.node}


def test_a_later_hop_worked_on_what_the_one_before_signed() -> None:
    check_input(samples.receipt(input=samples.digest("rows")), samples.receipt(output=samples.digest("rows")), None)
    with pytest.raises(LinkMismatch):
        check_input(samples.receipt(), samples.receipt(output=samples.digest("others")), None)


def test_the_last_hop_signed_the_very_rows_that_it_returned() -> None:
    rows = [b"", b"row"]
    receipt = samples.receipt(last=2, output=merkle_root([leaf(row) for row in rows]))
    check_output(receipt, rows)
    with pytest.raises(CorruptResult, match="other results"):
        check_output(receipt, [b"row", b""])


def test_a_window_is_signed_once_for_each_revision() -> None:
    once = SignedOnce()
    for receipt in (GOOD, GOOD, replace(GOOD, revision=1, output=samples.digest("grown"))):
        once.check(receipt)
    other = replace(GOOD, output=samples.digest("lie"))
    with pytest.raises(CorruptResult, match="two receipts") as raised:
        once.check(other)
    assert raised.value.fields == {"hop": GOOD.node}


def test_two_nodes_agree_when_the_same_work_has_the_same_output() -> None:
    other = replace(GOOD, node=samples.address("auditor"), session=samples.digest("other"), at=5, revision=3)
    assert same_work(GOOD, other)
    assert agree(GOOD, other)
    assert same_work(GOOD, replace(other, output=samples.digest("lie")))
    assert not agree(GOOD, replace(other, output=samples.digest("lie")))


@pytest.mark.parametrize(
    "changes",
    [{"first": 1}, {"last": 31}, {"start": 1}, {"end": 3}, {"model": samples.digest("x")},
     {"input": samples.digest("x")}, {"context": samples.digest("x")}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_other_work_proves_nothing(changes: dict[str, object]) -> None:
    other = replace(GOOD, **changes)  # type: ignore[arg-type]
    assert not same_work(GOOD, other)
    assert not agree(GOOD, other)
