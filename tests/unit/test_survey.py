"""Asking many nodes, most of them dead, over real sockets; and what is made of what they say of themselves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import samples
from tallystick.routing.candidates import LAYER_S, Candidate, Expected
from tallystick.routing.claims import MAX_LINKS, STEP_ROWS, Claims, read_claims
from tallystick.routing.cost import LONGEST_S, Workload
from tallystick.routing.route import choose
from tallystick.routing.survey import Round, well_served
from tallystick_protocol.errors import TallystickError
from tallystick_protocol.peer import Peers

LAYERS = 12


@dataclass(frozen=True, slots=True)
class Village:
    """URLs on loopback: of what answers /v1/info, of what accepts and says nothing, and of nobody."""

    alive: str
    hanging: str
    refusing: str


@contextlib.asynccontextmanager
async def village() -> AsyncIterator[Village]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = json.dumps({"status": {"rows_per_s": 100}}).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        writer.close()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    alive = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
    hanging = await asyncio.start_server(hang, "127.0.0.1", 0, backlog=1024)
    closed = await asyncio.start_server(hang, "127.0.0.1", 0)
    urls = [f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in (alive, hanging, closed)]
    closed.close()
    try:
        yield Village(*urls)
    finally:
        alive.close()
        hanging.close()


async def test_a_thousand_nodes_most_of_them_dead_are_asked_no_longer_than_it_pays() -> None:
    """Hanging ones are not waited for once every layer is served by three operators, whose offers then make a route."""
    async with village() as there:
        nodes = [
            (f"n{i}", there.alive if i % 20 == 0 else there.hanging if i % 2 else there.refusing, i % 4 * 3)
            for i in range(1000)
        ]
        peers, asked = Peers(), []

        async def ask(entry: tuple[str, str, int]) -> Candidate | None:
            name, url, start = entry
            asked.append(name)
            try:
                info = await peers.info(url, 30.0)
            except TallystickError:
                return None
            claims = read_claims(info["status"], 3)
            return samples.candidate(name, start, start + 3, expected=claims.delivers)

        spread = [(name, url, i // 20 % 4 * 3) for i, (name, url, _) in enumerate(nodes)]
        round_of = Round(spread, ask)
        answers = await round_of.settle(lambda so_far: well_served([c for c in so_far if c is not None], LAYERS))
        await round_of.close()
        await peers.close()
        known = [answer for answer in answers if answer is not None]
        assert well_served(known, LAYERS)
        assert len(round_of.unanswered()) > 100  # of those that hang, nobody was waited for
        assert len(asked) < 1000
        assert len(choose(known, Workload(LAYERS)).hops) == 4


async def test_where_they_never_suffice_everybody_is_asked_and_waited_for() -> None:
    async with village() as there:
        peers = Peers()

        async def ask(url: str) -> bool:
            try:
                await peers.info(url, 0.2)
            except TallystickError:
                return False
            return True

        urls = [there.hanging, there.alive, there.refusing] * 10
        round_of = Round(urls, ask, at_once=7)
        answers = await round_of.settle(lambda so_far: False)
        await round_of.close()
        await peers.close()
        assert (len(answers), sum(answers)) == (30, 10)
        assert round_of.unanswered() == []


async def test_late_answers_are_kept_and_closing_drops_what_is_on_its_way() -> None:
    gate = asyncio.Event()

    async def ask(number: int) -> int:
        if number:
            await gate.wait()
        return number

    round_of = Round([0, 1, 2], ask, at_once=2)
    assert await round_of.settle(lambda so_far: True) == [0]
    assert round_of.unanswered() == [1, 2]
    gate.set()
    while round_of.unanswered():
        await asyncio.sleep(0)
    assert sorted(round_of.answers.values()) == [0, 1, 2]
    await round_of.close()
    hanging = Round([1], lambda _: asyncio.get_running_loop().create_future())
    await hanging.close()
    assert hanging.answers == {}


async def test_nobody_to_ask_is_no_answer() -> None:
    assert await Round([], lambda _: asyncio.sleep(0)).settle(lambda _: False) == []


def test_well_served_is_every_layer_by_three_operators_of_one_class() -> None:
    three = [samples.candidate(f"n{i}", 0, 4) for i in range(3)]
    assert well_served(three, 4)
    assert not well_served(three[:2], 4)
    assert not well_served([*three[:2], samples.candidate("n9", 0, 4, operator="n0")], 4)
    assert not well_served([*three[:2], samples.candidate("n9", 0, 4, numeric_class=samples.digest("other"))], 4)
    assert not well_served([*three[:2], samples.candidate("n9", 0, 3)], 4)
    assert not well_served([samples.candidate(f"n{i}", 0, 9) for i in range(3)], 4)


# -- claims


def test_what_a_node_says_becomes_what_is_expected() -> None:
    node = samples.address("other")
    told = {"rows_per_s": 100, "step_ms": 20.0, "backlog_ms": 5, "parts": True, "links_ms": {node.lower(): 12.5}}
    claims = read_claims(told, 4)
    assert claims == Claims(Expected(0.005, 0.0025, 0.005), True, {node: 0.0125})
    assert read_claims({**told, "row_ms": 2}, 4).delivers == Expected(0.005, 0.0005, 0.005)
    assert read_claims({"rows_per_s": 100}, 4).delivers == Expected(STEP_ROWS / 400, 1 / 400)


@pytest.mark.parametrize("status", [None, [], "x", {}, {"rows_per_s": None}, {"rows_per_s": 0}])
def test_who_says_nothing_is_expected_to_be_ordinary(status: object) -> None:
    assert read_claims(status, 4) == Claims(Expected(LAYER_S, LAYER_S / STEP_ROWS))


odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 80), 1 << 80),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=45), st.floats(), max_size=3),
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(["rows_per_s", "step_ms", "row_ms", "backlog_ms", "parts", "links_ms"]), odd))
def test_odd_claims_never_raise_and_stay_within_bounds(status: dict[str, object]) -> None:
    claims = read_claims(status, 4)
    figures = [claims.delivers.layer_s, claims.delivers.prefill_s, claims.delivers.wait_s, *claims.links.values()]
    assert all(math.isfinite(figure) and 0 <= figure <= LONGEST_S for figure in figures)


def test_a_node_with_very_many_neighbours_is_heard_so_far() -> None:
    told = {samples.address(f"n{i}"): 1.0 for i in range(1000)}
    assert len(read_claims({"links_ms": told}, 4).links) == MAX_LINKS
