"""Receipts: what a claim may say, its roots, its context."""

from __future__ import annotations

import hashlib

import pytest

from harness import samples
from tallystick_protocol.errors import BadMessage
from tallystick_protocol.receipts import Context, Receipt, leaf, merkle_root, pack_flags, unpack_flags
from tallystick_protocol.signing import from_words, to_words
from tallystick_protocol.types import Digest


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def test_a_leaf_and_a_node_are_hashed_apart() -> None:
    assert leaf(b"row") == sha(b"\0row")
    assert leaf(b"") == sha(b"\0")
    a, b = leaf(b"a"), leaf(b"b")
    assert merkle_root([a, b]) == sha(b"\x01" + a + b)
    assert merkle_root([a]) == a


@pytest.mark.parametrize("num_rows", range(1, 34))
def test_the_root_is_that_of_a_plain_recursion_with_odd_nodes_promoted(num_rows: int) -> None:
    def root(level: list[bytes]) -> bytes:
        if len(level) == 1:
            return level[0]
        whole = [sha(b"\x01" + level[i] + level[i + 1]) for i in range(0, len(level) - 1, 2)]
        return root(whole + level[len(level) - len(level) % 2 :])

    leaves = [leaf(bytes([i])) for i in range(num_rows)]
    assert merkle_root(leaves) == root(list(leaves))


def test_no_two_different_lists_of_rows_have_the_same_root() -> None:
    rows = [bytes([i]) for i in range(5)]
    lists = [rows[:n] for n in range(1, 6)] + [rows[::-1], [*rows, rows[-1]], [*rows[:4], b""], [b"", *rows[1:]]]
    assert len({merkle_root([leaf(row) for row in listed]) for listed in lists}) == len(lists)


def test_a_root_needs_a_row() -> None:
    with pytest.raises(ValueError, match="leaf"):
        merkle_root([])


@pytest.mark.parametrize("changes", [{"start": 2}, {"start": 3}, {"first": 32}, {"first": 40}], ids=str)
def test_a_receipt_for_no_layers_or_no_positions_is_refused_at_the_edge(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"no (layers|positions)"):
        samples.receipt(**changes)
    values = {name: getattr(samples.receipt(), name) for name in Receipt.__slots__}
    words = to_words(samples.unchecked(Receipt, {**values, **changes}))
    with pytest.raises(BadMessage):
        from_words(Receipt, words)


def test_the_context_names_everything_that_the_outputs_depend_on() -> None:
    base = Context("fp32", "f32", 64, (True, False, True))
    others = [
        Context("bf16w", "f32", 64, (True, False, True)),
        Context("fp32", "bf16", 64, (True, False, True)),
        Context("fp32", "f32", 65, (True, False, True)),
        Context("fp32", "f32", 64, (True, True, True)),
        Context("fp32", "f32", 64, (True, False, True), Digest(bytes(32))),
    ]
    assert len({context.digest() for context in (base, *others)}) == 6
    text = b'{"memory":null,"numerics":"fp32","token_types":null,"top_k":64,"want":"05","wire":"f32"}'
    assert base.digest() == sha(text)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 31, 32, 33, 4096])
def test_flags_come_back_as_they_were(count: int) -> None:
    flags = tuple(i % 3 == 0 for i in range(count))
    assert unpack_flags(pack_flags(flags), count) == flags
    assert len(pack_flags(flags)) == (count + 7) // 8


@pytest.mark.parametrize(
    ("packed", "count"),
    [(b"", 1), (b"\0", 0), (b"\0\0", 8), (b"\x02", 1), (b"\x80", 7), (b"\xff", 9), (b"\xff\x02", 9)],
)
def test_a_bitmap_of_another_length_or_with_bits_in_its_padding_is_refused(packed: bytes, count: int) -> None:
    with pytest.raises(ValueError, match="bitmap"):
        unpack_flags(packed, count)
