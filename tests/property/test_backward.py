"""Audits that extend backwards: hops that refuse their rows, or give others than they signed for, and failovers that
find out what the lost hop did. On one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from harness.agreeing import corrupt
from harness.small_models import Models, fast
from harness.small_world import PRICE, Node, World, audit_at_end, generate
from tallystick.session import books
from tallystick.session.auditing import Audit, Disagreement, Ruling, arbitrate
from tallystick.session.session import Session
from tallystick.verdict import Policy
from tallystick_node.session.hop import Hop
from tallystick_protocol.errors import Rejected
from tallystick_protocol.frames import Frame
from tallystick_protocol.types import WINDOW, Address, Positions, Span

PROMPT = [7 + 3 * i % 90 for i in range(40)]
TOKENS = 40
LIES_FROM = 45
Act = Callable[[World, Session], Awaitable[None]]


@pytest.fixture(scope="module")
def truth(models: Models, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    return fast(lambda: answer(models, tmp_path_factory.mktemp("truth"), "off", look=lambda *_: None))


async def answer(
    models: Models, folder: Path, policy: Policy, *, copies: int = 3, prepare: Callable[[World], Any] = lambda _: None,
    acts: dict[int, Act] | None = None, audit: int | None = None, look: Callable[[World, Session], None],
) -> list[int]:  # fmt: skip
    """An answer over the first node of each span. audit: a hop that is audited when the answer is there."""
    world = models.world(folder, copies)
    prepare(world)
    session = await world.session(policy, 5.0)
    beside = []

    def on_token(count: int) -> None:
        if acts and (act := acts.pop(count, None)) is not None:
            beside.append(asyncio.ensure_future(act(world, session)))

    try:
        ids = await generate(session, PROMPT, TOKENS, on_token=on_token)
        if audit is not None:
            ids = await audit_at_end(session, audit, PROMPT, ids)
        await session.take_leave()
    finally:
        await session.close()
        await asyncio.gather(*beside)
    look(world, session)
    for node in world.nodes.values():
        await node.kill()
        node.till.close()
        node.journal.close()
    return ids


def named(world: World, name: str) -> Node:
    return next(node for node in world.nodes.values() if node.name == name)


def rows_signed(world: World, node: Node) -> int:
    units = node.engine.model.span.units(world.manifest.layers)
    return int(node.till.account(world.key.address).signed) // (units * PRICE)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What nodes, by name, do when they are to send kept rows: "refuse", or "other" rows than they signed for. What
    they did is told under `name + " did"`."""
    behaviour: dict[str, str] = {}
    honest = Hop._on_replay
    names: dict[Address, str] = {}
    start = Node.start

    def remember(self: Node) -> None:
        names[self.address] = self.name
        start(self)

    async def replay(self: Hop, frame: Frame) -> None:
        name = names[self.shop.node]
        how = behaviour.get(name)
        if how is None:
            await honest(self, frame)
            return
        behaviour[name + " did"] = how
        if how == "refuse":
            raise Rejected("these rows are nobody's business")
        outputs = self.record.outputs

        def other(positions: Positions) -> tuple[list[bytes], list[bool]]:
            rows, want = outputs(positions)
            return [row[4:] + row[:4] for row in rows], want

        self.record.outputs = other  # type: ignore[method-assign]
        try:
            await honest(self, frame)
        finally:
            self.record.outputs = outputs  # type: ignore[method-assign]

    monkeypatch.setattr(Node, "start", remember)
    monkeypatch.setattr(Hop, "_on_replay", replay)
    return behaviour


@pytest.mark.parametrize("policy", ["audit", "full"])
def test_an_honest_hop_that_refuses_its_rows_is_replaced_and_accused_of_nothing(
    models: Models, truth: list[int], tmp_path: Path, replays: dict[str, str], policy: Policy
) -> None:
    replays["[1, 2)#0"] = "refuse"

    def look(world: World, session: Session) -> None:
        refuser = named(world, "[1, 2)#0").address
        assert replays["[1, 2)#0 did"] == "refuse" and session.route[1].node != refuser
        assert not session.verdict.accusations and refuser in {one.avoided[0] for one in session.verdict.attributions}
        assert {check.span for check in session.verdict.checks} >= {Span(2, 3)} and session.verdict.failed == 0

    found = fast(lambda: answer(models, tmp_path, policy, audit=2 if policy == "audit" else None, look=look, copies=4))
    assert found == truth


def test_a_liar_that_refuses_its_rows_is_named_by_what_its_successor_rebuilds(
    models: Models, truth: list[int], tmp_path: Path, replays: dict[str, str]
) -> None:
    """Hop 1 lied and hop 2 is audited: the rows that it worked on are rebuilt, and are not what hop 1 signed for."""
    replays["[1, 2)#0"] = "refuse"

    def look(world: World, session: Session) -> None:
        liar, verdict = named(world, "[1, 2)#0").address, session.verdict
        assert replays["[1, 2)#0 did"] == "refuse"
        (accused,) = verdict.accusations
        assert accused.node == liar and accused.span == Span(1, 2) and accused.positions.first == WINDOW
        assert len(set(accused.witnesses)) == 2 and liar not in accused.witnesses
        assert [one.cause for one in verdict.attributions] == ["protocol", "fraud"]
        assert session.route[2].node == named(world, "[2, 3)#0").address, "who was lied to stays"
        assert all(check.passed for check in verdict.checks if check.span == Span(2, 3))

    found = fast(
        lambda: answer(models, tmp_path, "audit", audit=2, look=look,
                       prepare=lambda world: corrupt(named(world, "[1, 2)#0"), LIES_FROM))
    )  # fmt: skip
    assert found == truth


def test_a_hop_that_gives_auditors_other_rows_than_it_signed_for_is_replaced(
    models: Models, truth: list[int], tmp_path: Path, replays: dict[str, str]
) -> None:
    replays["[1, 2)#0"] = "other"

    def look(world: World, session: Session) -> None:
        feeder, verdict = named(world, "[1, 2)#0").address, session.verdict
        assert replays["[1, 2)#0 did"] == "other" and not verdict.accusations
        assert session.route[1].node != feeder and session.route[2].node == named(world, "[2, 3)#0").address
        assert [one.cause for one in verdict.attributions] == ["link", "link"], "an auditor first, then the hop"
        assert verdict.attributions[-1].avoided == (feeder,)
        assert {check.span for check in verdict.checks} == {Span(2, 3)} and verdict.failed == 0

    found = fast(lambda: answer(models, tmp_path, "audit", audit=2, look=look, copies=4))
    assert found == truth


@pytest.mark.parametrize("liar", ["[1, 2)#0", "[2, 3)#0"])
def test_a_failover_finds_out_that_the_lost_hop_lied(
    models: Models, truth: list[int], tmp_path: Path, liar: str
) -> None:
    async def kill(world: World, _: Session) -> None:
        await named(world, liar).kill()

    def look(world: World, session: Session) -> None:
        (accused,) = session.verdict.accusations
        assert accused.node == named(world, liar).address and accused.positions == Positions(WINDOW, 2 * WINDOW)
        assert rows_signed(world, named(world, liar)) >= WINDOW, "what was paid before is paid"
        assert [one.cause for one in session.verdict.attributions] == ["overload", "fraud"]
        assert [old for old, _, _ in session.verdict.replaced] == [accused.node], "who was lied to stays"

    found = fast(
        lambda: answer(models, tmp_path, "off", acts={30: kill}, look=look,
                       prepare=lambda world: corrupt(named(world, liar), LIES_FROM))
    )  # fmt: skip
    assert found == truth


def test_a_successor_that_lies_is_named_and_not_who_left(models: Models, truth: list[int], tmp_path: Path) -> None:
    liars: list[str] = []

    async def kill(world: World, session: Session) -> None:
        successor = world.nodes[session.openings.stand_ins(1)[0].node]
        device = corrupt(successor, LIES_FROM)
        liars.append(successor.name)
        session.setting.candidates[:] = await world.look()
        assert session.openings.stand_ins(1)[0].node == successor.address
        await named(world, "[1, 2)#0").kill()
        del device

    def look(world: World, session: Session) -> None:
        (accused,) = session.verdict.accusations
        liar = named(world, liars[0])
        assert accused.node == liar.address and named(world, "[1, 2)#0").address in accused.witnesses
        assert rows_signed(world, liar) == WINDOW, "and nothing of the window that it lied in"

    found = fast(lambda: answer(models, tmp_path, "off", acts={30: kill}, look=look, copies=4))
    assert found == truth


@pytest.mark.parametrize("lost", ["hop", "auditor"])
def test_who_takes_the_place_of_one_in_dispute_is_not_judged_for_it(
    models: Models, truth: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """Under `full`: the hop lies, its auditor says so, and one of them is gone before a third node has answered."""
    worlds: list[World] = []

    async def arbitrate_late(session: Session, audit: Audit, disagreement: Disagreement) -> Ruling:
        liar = named(worlds[0], "[1, 2)#0")
        ruling = await arbitrate(session, audit, disagreement)
        if ruling.liar == liar.address:
            await (liar if lost == "hop" else worlds[0].nodes[audit.remote.node]).kill()
            while session.hops[1].node == liar.address and audit in session.audits:
                await asyncio.sleep(0.001)
        return ruling

    def prepare(world: World) -> None:
        worlds.append(world)
        corrupt(named(world, "[1, 2)#0"), LIES_FROM)

    def look(world: World, session: Session) -> None:
        liar, verdict = named(world, "[1, 2)#0").address, session.verdict
        assert {one.node for one in verdict.accusations} == {liar}
        assert [old for old, _, _ in verdict.replaced] == [liar], "its successor stays"
        assert {one.cause for one in verdict.attributions} == {"overload", "fraud"}

    monkeypatch.setattr(books, "arbitrate", arbitrate_late)
    assert fast(lambda: answer(models, tmp_path, "full", copies=4, prepare=prepare, look=look)) == truth
