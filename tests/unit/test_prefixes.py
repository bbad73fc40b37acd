"""Which rows of ended sessions are kept, at the nodes and in the client's memory, and for how long."""

from __future__ import annotations

import asyncio
from typing import Any

from tallystick.prefixes import MAX_KEPT, Form, Prefix, Prefixes
from tallystick_node.session.kept import KeptRows, Source
from tallystick_node.session.record import Record
from tallystick_node.session.windows import Side
from tallystick_protocol.types import ZERO_ADDRESS, Address, ModelId, SessionId, Span

HOPS = ((Address("0xA"), Span(0, 2)), (Address("0xB"), Span(2, 4)))
FORM = Form(ModelId(bytes(32)), 8, "f32")


def name(number: int) -> SessionId:
    return SessionId(number.to_bytes(32, "big"))


def source(number: int, rows: int = 40, cache: Any = "its rows") -> Source:
    record = Record(one_shot=False)
    record.append([b"in"] * rows, [b"out"] * rows, [False] * rows)
    return Source(name(number), ZERO_ADDRESS, Span(0, 2), (8, "f32"), Side(), cache, record, rows, asyncio.Lock())


class Hands:
    """A clock, and what was let go of."""

    def __init__(self) -> None:
        self.now = 100.0
        self.freed: list[SessionId] = []


def test_a_node_keeps_rows_until_nobody_has_used_them_for_long_enough() -> None:
    hands = Hands()
    kept = KeptRows(10.0, hands.freed.append, lambda: hands.now)
    sources = [source(number) for number in (1, 2, 3)]
    assert all(kept.keep(one) for one in sources)
    hands.now = 108.0
    assert kept.find(name(1)) is sources[0]
    hands.now = 112.0
    assert kept.find(name(2)) is None
    assert (hands.freed, len(kept)) == ([name(2), name(3)], 1)
    assert kept.find(name(1)) is sources[0]
    kept.drop(name(1))
    kept.drop(name(1))
    assert hands.freed[2:] == [name(1)] and not kept.evict()


def test_a_node_gives_up_first_what_was_not_used_for_longest() -> None:
    hands = Hands()
    kept = KeptRows(10.0, hands.freed.append, lambda: hands.now)
    for number in (1, 2, 3):
        kept.keep(source(number))
    kept.find(name(1))
    assert [kept.evict() for _ in range(4)] == [True, True, True, False]
    assert hands.freed == [name(2), name(3), name(1)]


def test_a_node_keeps_nothing_that_is_of_no_use() -> None:
    hands = Hands()
    assert not KeptRows(0.0, hands.freed.append).keep(source(1))
    kept = KeptRows(10.0, hands.freed.append)
    assert not kept.keep(source(1, rows=31)), "less than a window"
    assert not kept.keep(source(2, cache=None)), "one-shot sessions"


def test_rows_are_not_taken_for_nothing_for_ever() -> None:
    one = source(1, rows=40)
    one.forks = 64 + 2 * 40 - 1
    assert not one.is_spent
    one.forks += 1
    assert one.is_spent


def prefix(number: int, ids: list[int], hops: tuple[tuple[Address, Span], ...] = HOPS) -> Prefix:
    return Prefix(name(number), FORM, hops, tuple(ids), (False,) * len(ids), {})


def test_a_client_finds_the_longest_beginning_and_leaves_a_row_to_compute() -> None:
    system = list(range(100))
    known = Prefixes(10.0, lambda: 0.0)
    known.remember(prefix(1, [*system, 7, 7]))
    known.remember(prefix(2, [*system[:50], 9, *system[51:]]))
    known.remember(prefix(3, system[:20]))  # too short
    assert [(found.session, shared) for found, shared in known.find(FORM, [*system, 8])] == [
        (name(1), 100),
        (name(2), 50),
    ]
    assert known.find(FORM, system)[0][1] == 99
    assert known.find(FORM, [*system[:50], 9, 9])[0] == (prefix(2, [*system[:50], 9, *system[51:]]), 51)
    assert not known.find(Form(FORM.model, 4, "f32"), system) and not known.find(FORM, system[:33:-1])
    known.forget(name(1))
    assert known.find(FORM, [*system, 8])[0][1] == 50


def test_a_longer_session_on_the_same_nodes_takes_the_place_of_a_shorter_one() -> None:
    known = Prefixes(10.0, lambda: 0.0)
    turn = list(range(60))
    known.remember(prefix(1, turn))
    known.remember(prefix(2, turn, hops=HOPS[:1]))
    known.remember(prefix(3, turn * 2))
    assert [found.session for found, _ in known.find(FORM, turn * 3)] == [name(3), name(2)]
    for number in range(10, 50):
        known.remember(prefix(number, [number] * 40))
    assert len(known) == MAX_KEPT


def test_a_client_forgets_when_the_nodes_do() -> None:
    hands = Hands()
    known = Prefixes(10.0, lambda: hands.now)
    known.remember(prefix(1, [1] * 50))
    known.remember(prefix(2, [2] * 50))
    hands.now += 6
    known.used(name(1))
    hands.now += 6
    assert known.find(FORM, [1] * 60) and not known.find(FORM, [2] * 60)
