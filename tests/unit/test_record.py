"""A hop's memory of a session's rows."""

from __future__ import annotations

import pytest

from tallystick_node.session.record import Record
from tallystick_protocol.errors import BadPosition
from tallystick_protocol.receipts import leaf, merkle_root
from tallystick_protocol.types import Positions


def filled(count: int, one_shot: bool = False) -> Record:
    record = Record(one_shot)
    rows = [bytes([i]) for i in range(count)]
    record.append(rows, [row * 2 for row in rows], [i % 2 == 0 for i in range(count)])
    return record


def test_a_repeat_with_the_same_bytes_is_known_and_the_rest_is_new() -> None:
    record = filled(3)
    assert record.new_rows(1, [b"\1", b"\2", b"\3", b"\4"]) == 2
    assert record.new_rows(3, [b"x"]) == 0
    assert record.new_rows(0, []) == 0


def test_a_repeat_with_other_bytes_names_the_position() -> None:
    with pytest.raises(BadPosition, match="position 2 was computed on other bytes"):
        filled(3).new_rows(1, [b"\1", b"x"])


def test_rows_that_skip_ahead_are_told_which_position_is_next() -> None:
    with pytest.raises(BadPosition, match="the next one here is 3") as raised:
        filled(3).new_rows(4, [b"x"])
    assert raised.value.fields == {"expected": 3}


def test_a_cropped_position_may_be_computed_on_other_bytes() -> None:
    record = filled(3)
    record.crop(2)
    assert record.new_rows(2, [b"x"]) == 0


@pytest.mark.parametrize(("count", "complete", "windows"), [(0, 0, 0), (1, 0, 1), (31, 0, 1), (32, 1, 1), (33, 1, 2)])
def test_windows_are_32_positions_and_the_last_may_be_partial(count: int, complete: int, windows: int) -> None:
    record = filled(count)
    assert (record.num_complete, record.num_windows) == (complete, windows)
    assert record.window(0) == Positions(0, min(count, 32))
    assert record.window(windows) == Positions(count, count)


def test_a_one_shot_session_is_one_window_whatever_its_length() -> None:
    record = filled(100, one_shot=True)
    assert (record.num_complete, record.num_windows, record.window(0)) == (0, 1, Positions(0, 100))


def test_a_part_of_a_one_shot_session_cannot_be_cropped_because_its_receipt_would_be_false() -> None:
    record = filled(10, one_shot=True)
    with pytest.raises(BadPosition, match="bidirectional"):
        record.crop(5)
    assert len(record) == 10
    record.crop(10)
    assert len(record) == 10
    record.crop(0)
    assert len(record) == 0


def test_a_claim_is_over_the_rows_and_an_unwanted_output_is_the_empty_row() -> None:
    record = Record(one_shot=False)
    record.append([b"a", b"b"], [b"", b"B"], [False, True])
    claim = record.claim(0)
    assert claim.input == merkle_root([leaf(b"a"), leaf(b"b")])
    assert claim.output == merkle_root([leaf(b""), leaf(b"B")])
    assert claim.want == (False, True)


def test_what_is_not_computed_is_not_given_out() -> None:
    with pytest.raises(BadPosition, match="not computed yet; 3 are"):
        filled(3).outputs(Positions(1, 4))
