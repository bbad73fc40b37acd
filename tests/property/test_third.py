"""The client itself as the third node, where no other one can say who is wrong. On one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.agreeing import agreement, corrupt
from harness.small_models import Models, fast
from harness.small_world import Node, World, audited, generate
from harness.third import recomputing
from tallystick.session.session import Session
from tallystick.verdict import Verdict
from tallystick_protocol.errors import NoAuditor
from tallystick_protocol.receipts import Receipt
from tallystick_protocol.types import WINDOW, Positions

PROMPT = [7 + 3 * i % 90 for i in range(40)]
TOKENS = 40
LIES_FROM = 45


def named(world: World, name: str) -> Node:
    return next(node for node in world.nodes.values() if node.name == name)


def one_operator(world: World, *names: str) -> None:
    """These nodes are of one operator: none of them checks another one."""
    first = named(world, names[0])
    for name in names[1:]:
        node = named(world, name)
        node.candidate = replace(node.candidate, operator=first.address, payee=first.address)


async def end(world: World) -> None:
    for node in world.nodes.values():
        await node.kill()
        node.till.close()
        node.journal.close()


async def answered(
    world: World, recompute: Any, look: Callable[[Session], None], acts: dict[int, Callable[[], Any]] | None = None,
    policy: Any = "full",
) -> list[int]:  # fmt: skip
    plain = await world.prepare(policy, 5.0)
    session = Session(replace(plain.setting, recompute=recompute), plain.route, Verdict(policy))
    acts, beside = acts or {}, []

    def on_token(count: int) -> None:
        if (act := acts.pop(count, None)) is not None:
            beside.append(act())

    try:
        await session.open(audited(session))
        ids = await generate(session, PROMPT, TOKENS, on_token=on_token)
        await session.take_leave()
        return ids
    finally:
        look(session)
        await session.close()
        await end(world)


@pytest.fixture(scope="module")
def truth(models: Models, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    async def run() -> list[int]:
        return await answered(models.world(tmp_path_factory.mktemp("truth")), None, lambda _: None, policy="off")

    return fast(run)


@pytest.mark.parametrize("liar", ["[0, 1)#0", "[1, 2)#0", "[2, 3)#0"])
def test_a_hop_is_named_by_its_auditor_and_the_client(
    models: Models, truth: list[int], tmp_path: Path, liar: str
) -> None:
    """The third node of the span is the liar's own."""
    asked: list[Receipt] = []

    async def run() -> list[int]:
        world = models.world(tmp_path, 3)
        corrupt(named(world, liar), LIES_FROM)
        one_operator(world, liar, liar.replace("#0", "#2"))

        def look(session: Session) -> None:
            (accused,) = session.verdict.accusations
            assert (accused.node, accused.positions) == (named(world, liar).address, Positions(WINDOW, 2 * WINDOW))
            assert set(accused.witnesses) == {named(world, liar.replace("#0", "#1")).address, world.key.address}
            assert [one.node for one in asked] == [accused.node]
            (cause,) = session.verdict.attributions
            assert (cause.cause, cause.accused) == ("fraud", accused.node)

        return await answered(world, recomputing(world, asked), look)

    assert fast(run) == truth


def test_an_auditor_is_named_by_the_hop_and_the_client(models: Models, truth: list[int], tmp_path: Path) -> None:
    asked: list[Receipt] = []

    async def run() -> None:
        world = models.world(tmp_path)
        corrupt(named(world, "[1, 2)#1"), LIES_FROM)

        def look(session: Session) -> None:
            (accused,) = session.verdict.accusations
            hop = session.hops[1]
            assert accused.node == named(world, "[1, 2)#1").address and hop.node == named(world, "[1, 2)#0").address
            assert set(accused.witnesses) == {hop.node, world.key.address} and len(asked) == 1

        with pytest.raises(NoAuditor):  # there was no other one
            await answered(world, recomputing(world, asked), look)

    fast(run)


def test_a_lost_hop_is_named_by_its_successor_and_the_client(
    models: Models, truth: list[int], tmp_path: Path
) -> None:
    asked: list[Receipt] = []

    async def run() -> list[int]:
        world = models.world(tmp_path)
        liar = named(world, "[1, 2)#0")
        corrupt(liar, LIES_FROM)

        def look(session: Session) -> None:
            (accused,) = session.verdict.accusations
            assert accused.node == liar.address and asked[0].node == named(world, "[1, 2)#1").address
            assert set(accused.witnesses) == {asked[0].node, world.key.address}

        return await answered(
            world, recomputing(world, asked), look, {30: lambda: asyncio.ensure_future(liar.kill())}, policy="off"
        )

    assert fast(run) == truth


async def _cannot(_: bytes, __: Receipt) -> Any:
    raise NoAuditor("of another class")


@pytest.mark.parametrize("recompute", [None, _cannot])
def test_nobody_is_accused_where_the_client_cannot_say(models: Models, tmp_path: Path, recompute: Any) -> None:
    async def run() -> None:
        world = models.world(tmp_path)
        corrupt(named(world, "[1, 2)#0"), LIES_FROM)

        def look(session: Session) -> None:
            assert not session.verdict.accusations
            assert [one.cause for one in session.verdict.attributions] == ["numerics"]
            assert {node.address for node in world.nodes.values() if node.name.startswith("[1")} == session.avoid

        with pytest.raises(Exception, match="layers"):
            await answered(world, recompute, look)

    fast(run)


def test_two_routes_that_differ_are_told_apart(models: Models, truth: list[int], tmp_path: Path) -> None:
    """`agree=2`, and nobody else serves the span."""
    asked: list[Receipt] = []

    async def run() -> None:
        world = models.world(tmp_path)
        corrupt(named(world, "[1, 2)#0"), LIES_FROM)
        agreed = await agreement(world, "agree=2")
        for session in agreed.sessions:
            session.setting = replace(session.setting, recompute=recomputing(world, asked), wait_s=0.0)
        try:
            with pytest.raises(Exception, match="layers"):  # nobody is left to take the liar's place
                await generate(agreed, PROMPT, TOKENS)  # type: ignore[arg-type]
            (accused,) = agreed.verdict.accusations
            assert accused.node == named(world, "[1, 2)#0").address and world.key.address in accused.witnesses
        finally:
            await agreed.close()
            await end(world)

    fast(run)
