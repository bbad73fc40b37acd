"""Which windows a hop signs; the state machine in tests/property says the rest."""

from __future__ import annotations

import pytest

from harness import samples
from tallystick_node.session.record import Record
from tallystick_node.session.windows import Answer, Terms, Windows
from tallystick_protocol.errors import LinkMismatch
from tallystick_protocol.receipts import Receipt
from tallystick_protocol.signing import digest
from tallystick_protocol.types import ZERO32, ZERO_ADDRESS, Address, SessionId, Span

UPSTREAM = samples.address("upstream")


def hop(previous: Address = ZERO_ADDRESS, one_shot: bool = False) -> tuple[Record, Windows]:
    record = Record(one_shot)
    session = SessionId(samples.digest("session"))
    node, numeric_class = samples.address("n"), samples.digest("c")
    terms = Terms(node, samples.MODEL, numeric_class, session, 0, Span(2, 4), previous, 8, "fp32", "f32")
    return record, Windows(terms, record)


def compute(record: Record, count: int) -> None:
    rows = [bytes([i % 251, i // 251]) for i in range(len(record), len(record) + count)]
    record.append(rows, rows, [True] * count)


def sign(windows: Windows) -> list[Receipt]:
    signed = []
    while (receipt := windows.next_unsigned(0)) is not None:
        windows.signed(receipt, receipt.first // 32, digest(samples.STAKING, receipt))
        signed.append(receipt)
    return signed


def test_a_window_is_signed_when_it_is_complete() -> None:
    record, windows = hop()
    compute(record, 31)
    assert sign(windows) == []
    compute(record, 34)
    assert [(r.first, r.last, r.revision) for r in sign(windows)] == [(0, 32, 0), (32, 64, 0)]


def test_a_flush_signs_what_is_there_and_growth_signs_it_again_with_a_higher_revision() -> None:
    record, windows = hop()
    compute(record, 5)
    windows.flush(len(record))
    assert [(r.first, r.last, r.revision) for r in sign(windows)] == [(0, 5, 0)]
    assert sign(windows) == []
    compute(record, 30)
    assert [(r.first, r.last, r.revision) for r in sign(windows)] == [(0, 32, 1)]
    windows.flush(len(record))
    assert [(r.first, r.last, r.revision) for r in sign(windows)] == [(32, 35, 1)]


def test_a_flush_may_come_before_the_rows_that_it_is_for() -> None:
    record, windows = hop()
    windows.flush(5)
    compute(record, 4)
    assert sign(windows) == []
    compute(record, 1)
    assert [(r.first, r.last) for r in sign(windows)] == [(0, 5)]


def test_a_window_computed_anew_after_a_crop_gets_another_revision() -> None:
    record, windows = hop()
    compute(record, 64)
    before = sign(windows)
    record.crop(40)
    windows.crop(40)
    compute(record, 24)
    again = sign(windows)
    assert [(r.first, r.last, r.revision) for r in again] == [(32, 64, 1)]
    assert again[0].previous == digest(samples.STAKING, before[0])


def test_nothing_is_signed_before_the_previous_hop_has_signed_the_same_positions() -> None:
    record, windows = hop(UPSTREAM)
    compute(record, 32)
    assert windows.next_unsigned(0) is None
    windows.hear(samples.receipt(first=0, last=20, output=record.claim(0).input), 0)
    assert windows.next_unsigned(0) is None
    windows.hear(samples.receipt(first=0, last=32, revision=1, output=record.claim(0).input), 0)
    assert windows.next_unsigned(0) is not None


def test_a_previous_hop_that_signed_other_rows_is_named_and_can_still_correct_itself() -> None:
    record, windows = hop(UPSTREAM)
    compute(record, 32)
    windows.hear(samples.receipt(output=samples.digest("other")), 0)
    with pytest.raises(LinkMismatch) as raised:
        windows.next_unsigned(0)
    assert raised.value.fields == {"hop": UPSTREAM, "first": 0, "last": 32}
    windows.hear(samples.receipt(revision=1, output=record.claim(0).input), 0)
    assert len(sign(windows)) == 1


def test_an_older_revision_that_arrives_late_changes_nothing() -> None:
    record, windows = hop(UPSTREAM)
    compute(record, 32)
    windows.hear(samples.receipt(revision=2, output=record.claim(0).input), 0)
    windows.hear(samples.receipt(revision=1, output=samples.digest("older")), 0)
    assert len(sign(windows)) == 1


def test_receipts_may_arrive_in_any_order_and_are_answered_in_order_of_windows() -> None:
    record, windows = hop(UPSTREAM)
    compute(record, 96)
    for index in (2, 0, 1):
        at = record.window(index)
        windows.hear(samples.receipt(first=at.first, last=at.last, output=record.claim(index).input), index)
        if index == 2:
            assert windows.next_unsigned(0) is None
    assert [r.first for r in sign(windows)] == [0, 32, 64]


def test_what_the_replaced_hop_signed_for_unsigned_windows_no_longer_counts() -> None:
    record, windows = hop(UPSTREAM)
    compute(record, 32)
    windows.hear(samples.receipt(output=record.claim(0).input), 0)
    windows.replace_previous(samples.address("replacement"))
    assert windows.next_unsigned(0) is None


def test_rows_that_come_between_asking_and_signing_are_signed_for_next() -> None:
    record, windows = hop()
    compute(record, 5)
    windows.flush(len(record))
    receipt = windows.next_unsigned(0)
    assert receipt is not None
    compute(record, 27)  # while the journal writes
    windows.signed(receipt, 0, digest(samples.STAKING, receipt))
    assert [(r.first, r.last, r.revision) for r in sign(windows)] == [(0, 32, 1)]


# -- sketches


def sketching() -> tuple[Record, Windows]:
    record, windows = hop()
    return record, Windows(windows.terms, record, sketches=True)


def answer(windows: Windows, receipt: Receipt, name: str) -> Answer:
    assert windows.answers is not None
    found = windows.answers[digest(samples.STAKING, receipt)] = Answer(samples.digest(name), samples.digest("root"))
    return found


def test_a_window_waits_for_the_answer_about_the_one_before_and_carries_it() -> None:
    record, windows = sketching()
    compute(record, 96)
    first = sign(windows)
    assert [r.first for r in first] == [0] and first[0].challenge == first[0].sketches == ZERO32
    given = answer(windows, first[0], "one")
    second = sign(windows)
    assert [(r.first, r.challenge, r.sketches) for r in second] == [(32, given.challenge, given.sketches)]
    assert windows.next_unsigned(0) is None


def test_the_last_window_is_closed_once_it_is_flushed_and_answered_and_only_once() -> None:
    record, windows = sketching()
    compute(record, 40)
    (first,) = sign(windows)
    answer(windows, first, "one")
    windows.flush(40)
    (last,) = sign(windows)
    assert (last.first, last.last) == (32, 40)
    given = answer(windows, last, "two")
    (closing,) = sign(windows)
    assert closing.previous == digest(samples.STAKING, last) and closing.revision == last.revision + 1
    assert (closing.challenge, closing.sketches, closing.output) == (given.challenge, given.sketches, last.output)
    assert windows.next_unsigned(0) is None
    compute(record, 24)
    (grown,) = sign(windows)
    assert (grown.first, grown.last) == (32, 64) and grown.revision == closing.revision + 1
    assert grown.previous == digest(samples.STAKING, first), "nobody's window before is a closing receipt"


def test_a_crop_forgets_what_was_answered_about_rows_that_went() -> None:
    record, windows = sketching()
    compute(record, 64)
    (first,) = sign(windows)
    kept = answer(windows, first, "one")
    (second,) = sign(windows)
    answer(windows, second, "two")
    record.crop(40)
    windows.crop(40)
    assert windows.answers == {digest(samples.STAKING, first): kept}
    compute(record, 24)
    (again,) = sign(windows)
    assert again.challenge == kept.challenge and again.revision == 1
    assert windows.next_unsigned(0) is None, "its own challenge is to come"
