"""Hops that are slow, pause, stand still or lie about others, on one event loop whose clock jumps over waiting."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.small_models import Models, fast
from harness.small_world import Node, World, generate
from tallystick.session import remote
from tallystick.session.session import Session
from tallystick_node.session.hop import IDLE_TIMEOUT_S, Hop
from tallystick_protocol.errors import Unreachable
from tallystick_protocol.frames import Frame, Kind
from tallystick_protocol.types import Address

PROMPT = [7 + 3 * i % 90 for i in range(20)]
LONG = [7 + i % 90 for i in range(170)]
Act = Callable[[World, Session], Awaitable[None]]


class Told:
    """An answer, with something done after some of its tokens. gaps[n]: the time between token n and the next one."""

    def __init__(self, models: Models, folder: Path, prompt: list[int] = PROMPT, row_s: float = 0.0) -> None:
        self._models, self._folder, self._prompt, self._row_s = models, folder, prompt, row_s
        self.gaps: list[float] = []
        self.session: Session

    def answer(self, count: int, acts: dict[int, Act] | None = None, copies: int = 2) -> list[int]:
        """acts: what happens beside the answer once so many tokens are there; 0: once the session is open."""
        return fast(lambda: self._answer(count, acts or {}, copies))

    async def _answer(self, count: int, acts: dict[int, Act], copies: int) -> list[int]:
        world = self._models.world(self._folder / str(id(acts)), copies)
        for node in world.nodes.values():
            node.device.row_s = self._row_s
        session = self.session = await world.session(wait_s=120.0)
        going, at = [], [time.monotonic()]

        def on_token(reached: int) -> None:
            at.append(time.monotonic())
            if (act := acts.get(reached)) is not None:
                going.append(asyncio.ensure_future(act(world, session)))

        on_token(0)
        try:
            ids = await generate(session, self._prompt, count, on_token=on_token)
        finally:
            await session.close()
            for task in going:
                task.cancel()
            await end(world)
        self.gaps = [later - earlier for earlier, later in itertools.pairwise(at[1:])]
        return ids

    @property
    def replaced(self) -> list[Address]:
        return [lost for lost, _, _ in self.session.verdict.replaced]

    def failure(self, node: Address) -> float:
        """The chance that this client gives a node to be lost in the next session."""
        candidate = next(c for c in self.session.setting.candidates if c.node == node)
        return self.session.setting.reputation.expect(node, candidate.claimed, 1).failure


async def end(world: World) -> None:
    """Nothing may be left, once everybody goes on."""
    for node in world.nodes.values():
        node.go_on()
    assert not await world.leftovers()


def at(world: World, session: Session, hop: int) -> Node:
    return world.nodes[session.route[hop].node]


def hop_of(node: Node) -> Hop:
    assert node.sessions is not None
    (hop,) = node.sessions._hops.values()
    return hop


def test_pauses_that_grow_gain_a_hop_nothing(models: Models, tmp_path: Path) -> None:
    def pause(for_s: float) -> Act:
        async def act(world: World, session: Session) -> None:
            node = at(world, session, 1)
            node.hang()
            await asyncio.sleep(for_s)
            node.go_on()

        return act

    quiet, told = Told(models, tmp_path), Told(models, tmp_path)
    ids = told.answer(16, {3: pause(9.0), 6: pause(30.0), 9: pause(1e6)}, copies=3)
    assert ids == quiet.answer(16)
    assert max(told.gaps) < 11 and len(told.replaced) == 3, "once eight answers are known, 9 s are a loss, too"


def test_what_a_failover_took_is_no_step(models: Models, tmp_path: Path) -> None:
    """Both nodes of a span are away for 20 s; another hop that stands still afterwards is noticed in seconds."""

    async def lose_a_span(world: World, session: Session) -> None:
        span = session.route[1].span
        alike = [node for node in world.nodes.values() if node.candidate.span == span]
        for node in alike:
            await node.kill()
        await asyncio.sleep(20)
        for node in alike:
            node.start()

    stood: list[Address] = []

    async def stand(world: World, session: Session) -> None:
        node = at(world, session, 2)
        node.device.stands = True
        stood.append(node.address)

    told = Told(models, tmp_path)
    ids = told.answer(24, {9: lose_a_span, 13: stand})
    assert ids == Told(models, tmp_path).answer(24)
    assert 20 < told.gaps[9] < 22 and max(told.gaps[10:]) < 4
    assert stood[0] in told.replaced


@pytest.mark.parametrize("hop", [0, 1])
def test_who_was_lost_and_is_back_takes_over_at_once(models: Models, tmp_path: Path, hop: int) -> None:
    """Both nodes of a span die in turn, each when the other one serves; the first one has been started again."""

    async def kill(world: World, session: Session) -> None:
        await at(world, session, hop).kill()

    async def kill_and_start(world: World, session: Session) -> None:
        node = at(world, session, hop)
        await node.kill()
        node.start()

    told = Told(models, tmp_path)
    ids = told.answer(24, {6: kill_and_start, 14: kill})
    assert ids == Told(models, tmp_path).answer(24)
    first, second = told.replaced
    assert told.session.route[hop].node == first != second
    assert max(told.gaps) < 4


def test_a_link_that_is_back_soon_is_waited_for_where_nobody_else_is_there(models: Models, tmp_path: Path) -> None:
    async def flap(world: World, session: Session) -> None:
        node = at(world, session, 1)
        node.is_down = True
        node.cut()
        await asyncio.sleep(9)
        node.is_down = False

    told = Told(models, tmp_path)
    assert told.answer(16, {6: flap}, copies=1) == Told(models, tmp_path).answer(16, copies=1)
    assert not told.replaced and 9 < max(told.gaps) < 11
    session = told.session
    assert [hop.rows_due for hop in session.hops] == [len(session.ids)] * 3, "nothing was computed again"


def test_a_long_prompt_at_slow_nodes_is_waited_for(models: Models, tmp_path: Path) -> None:
    """16 s a frame, three frames and three hops: nobody is late. Nor is who replays it."""
    told = Told(models, tmp_path, LONG, row_s=0.25)
    ids = told.answer(4)
    assert not told.replaced
    assert ids == Told(models, tmp_path, LONG).answer(4)

    async def kill(world: World, session: Session) -> None:
        await at(world, session, 1).kill()

    assert told.answer(4, {1: kill}) == ids
    assert len(told.replaced) == 1 and 40 < told.gaps[1] < 50


def test_a_hop_that_stands_still_in_a_long_prompt_is_replaced(models: Models, tmp_path: Path) -> None:
    async def stand(world: World, session: Session) -> None:
        at(world, session, 1).device.stands = True

    told = Told(models, tmp_path, LONG, row_s=0.02)
    ids = told.answer(4, {0: stand})
    assert ids == Told(models, tmp_path, LONG).answer(4) and len(told.replaced) == 1


def test_who_stands_still_and_says_that_it_waits_for_money_is_believed_for_a_minute(
    models: Models, tmp_path: Path
) -> None:
    async def stand(world: World, session: Session) -> None:
        node = at(world, session, 1)
        node.device.stands = True
        control = hop_of(node).control
        send = control.send

        async def beg(frame: Frame) -> None:
            await send(replace(frame, body={**frame.body, "unpaid": True}) if frame.kind is Kind.PONG else frame)

        control.send = beg  # type: ignore[method-assign]

    told = Told(models, tmp_path)
    ids = told.answer(12, {5: stand})
    assert ids == Told(models, tmp_path).answer(12)
    assert len(told.replaced) == 1 and max(told.gaps) < 62


def test_a_hop_that_keeps_the_rows_that_it_says_it_has_is_found_out(models: Models, tmp_path: Path) -> None:
    """The hop behind it seems to be late, and so does the node that takes its place."""
    keeper: list[Address] = []

    async def keep(world: World, session: Session) -> None:
        node = at(world, session, 0)
        keeper.append(node.address)

        async def send(*_: Any) -> None:
            """Nothing."""

        hop_of(node).downstream._send = send  # type: ignore[method-assign]

    told = Told(models, tmp_path)
    ids = told.answer(20, {12: keep}, copies=3)
    assert ids == Told(models, tmp_path).answer(20, copies=3)
    assert keeper[0] in told.replaced and len(told.replaced) == 2


def test_a_crop_that_overtakes_a_replay_leaves_what_stands_before_it(models: Models, tmp_path: Path) -> None:
    """A hop dies among drafts; some of them are wrong, and dropped while the node in its place is being filled."""

    async def with_drafts(drafts: list[int]) -> tuple[list[int], float]:
        world = models.world(tmp_path / str(len(drafts)))
        for node in world.nodes.values():
            node.device.row_s = 0.02
        session = await world.session()
        (first,) = await generate(session, LONG, 1)
        await session.feed([first, *drafts], [True] * (1 + len(drafts)))
        began = time.monotonic()
        if drafts:
            await asyncio.sleep(0.5)  # results are on their way
            await at(world, session, 1).kill()
            while not session.verdict.replaced:
                session.news.clear()
                await session.repair.mend_first()
                await asyncio.sleep(0.01)
            await session.drop(len(LONG) + 1)
        more = await generate(session, [*LONG, first], 6)
        took_s = time.monotonic() - began
        await session.close()
        await end(world)
        return [first, *more], took_s

    plain, _ = fast(lambda: with_drafts([]))
    ids, took_s = fast(lambda: with_drafts([1, 2, 3]))
    assert ids == plain and took_s < 20


def test_who_is_only_named_by_another_hop_is_replaced_and_not_thought_worse_of(models: Models, tmp_path: Path) -> None:
    named: list[Address] = []

    async def name(world: World, session: Session) -> None:
        named.append(session.route[1].node)
        await hop_of(at(world, session, 0)).tell(Unreachable("the next hop is gone", hop=named[0]))

    told, other = Told(models, tmp_path), Told(models, tmp_path)
    assert told.answer(12, {5: name}) == other.answer(12)
    assert told.replaced == named
    assert told.failure(named[0]) <= 0.05

    async def kill(world: World, session: Session) -> None:
        await at(world, session, 1).kill()

    other.answer(12, {5: kill})
    assert other.failure(other.replaced[0]) > 0.3


@pytest.fixture
def one_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wall time passes as the loop's does."""
    monkeypatch.setattr(time, "time", lambda: 1.8e9 + time.monotonic())


def test_a_session_outlives_its_opening(
    models: Models, tmp_path: Path, one_clock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "OPEN_LIFETIME_S", 5)
    told = Told(models, tmp_path, row_s=0.5)
    assert told.answer(16) == Told(models, tmp_path).answer(16)
    assert sum(told.gaps) > 20 and not told.replaced


def test_signs_of_life_alone_keep_no_session(models: Models, tmp_path: Path) -> None:
    async def ask_for_long() -> tuple[list[int], list[int]]:
        world = models.world(tmp_path)
        session = await world.session()
        held = []
        for end_s in (IDLE_TIMEOUT_S - 10, IDLE_TIMEOUT_S + 10):
            while time.monotonic() < end_s:
                await asyncio.sleep(1)
                for hop in session.hops:
                    await hop.line.ping()
            held.append(sum(len(node.sessions) for node in world.nodes.values() if node.sessions is not None))
        held_bytes = [node.sessions.reserved_bytes for node in world.nodes.values() if node.sessions is not None]
        await session.close()
        await end(world)
        return held, held_bytes

    held, held_bytes = fast(ask_for_long)
    assert held == [3, 0] and not any(held_bytes)


def test_a_reader_may_pause_for_longer_than_nodes_wait(models: Models, tmp_path: Path) -> None:
    """Going on takes a replay, and is no node's fault."""

    async def with_a_pause() -> tuple[list[int], Session]:
        world = models.world(tmp_path)
        session = await world.session()
        ids = await generate(session, PROMPT, 8)
        await asyncio.sleep(IDLE_TIMEOUT_S + 10)
        known = PROMPT + ids
        more = await generate(session, known, 8)
        await session.close()
        await end(world)
        return ids + more, session

    told = Told(models, tmp_path)
    ids, session = fast(with_a_pause)
    assert ids == told.answer(16)
    told.session = session
    assert len(told.replaced) == 3 and all(told.failure(node) <= 0.05 for node in told.replaced)
