"""Answers that several routes carry at once, on one event loop: liars, losses, routes that are cut differently."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from harness.agreeing import agreement, corrupt
from harness.small_models import Models, fast
from harness.small_world import PRICE, Inline, Node, World, generate
from tallystick.agreement.agreement import Agreement
from tallystick.routing.choice import owners
from tallystick.speculation.steps import Speculation, Steps
from tallystick.verdict import Policy
from tallystick_protocol.errors import NoRoute
from tallystick_protocol.sampling import Sampling
from tallystick_protocol.types import WINDOW, Address, Span

PROMPT = [7 + 3 * i % 90 for i in range(40)]
TOKENS = 40
SAMPLED = Sampling(temperature=1.0, top_p=0.95, seed=11)
ROWS = len(PROMPT) + TOKENS - 1
LIES_FROM = 45
"""In the second window, after some tokens."""


@pytest.fixture(scope="module")
def truth(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[Sampling, list[int]]:
    """What one honest route says, greedily and with a seed."""

    async def ask(sampling: Sampling) -> list[int]:
        world = models.world(tmp_path_factory.mktemp("truth"), 1)
        session = await world.session()
        try:
            return await generate(session, PROMPT, TOKENS, sampling)
        finally:
            await session.close()
            await end(world)

    return {sampling: fast(lambda sampling=sampling: ask(sampling)) for sampling in (Sampling(), SAMPLED)}  # type: ignore[misc]


async def end(world: World) -> None:
    for node in world.nodes.values():
        node.go_on()
        await node.kill()
        node.till.close()
        node.journal.close()


def node_of(world: World, name: str) -> Node:
    return next(node for node in world.nodes.values() if node.name == name)


def signed(world: World, node: Node) -> int:
    """What the client's vouchers for a node come to, in rows of its span."""
    units = node.engine.model.span.units(world.manifest.layers)
    total = int(node.till.account(world.key.address).signed)
    assert total % (units * PRICE) == 0
    return total // (units * PRICE)


Story = Callable[[World, Agreement], Coroutine[Any, Any, None]]


def ask(
    models: Models, folder: Path, copies: int, policy: Policy, prepare: Callable[[World], Any] = lambda _: None,
    *, sampling: Sampling | None = None, acts: dict[int, Callable[[World, Agreement], Any]] | None = None,
    speculate: str = "off", routes: list[list[str]] | None = None,
    make: Callable[[Path], World] | None = None, look: Callable[[World, Agreement, list[int]], None],
) -> None:  # fmt: skip
    """One answer over k routes. prepare: before it begins. acts: beside it, once there are so many tokens."""

    async def run() -> None:
        world = make(folder) if make else models.world(folder, copies)
        prepare(world)
        agreed = await agreement(world, policy, routes)
        beside: list[asyncio.Future[Any]] = []
        taken_back: list[int] = []
        reached = [0]

        def on_token(count: int) -> None:
            if count < reached[0]:
                taken_back.append(count)
            reached[0] = count
            if acts and (act := acts.get(count)) is not None:
                beside.append(asyncio.ensure_future(act(world, agreed)))

        last = len(PROMPT) + TOKENS
        steps = Steps(
            agreed, sampling or Sampling(), Speculation.of(speculate, sampling or Sampling()), last,
            world.manifest.vocab,
        )  # fmt: skip
        try:
            ids = await generate(agreed, PROMPT, TOKENS, steps=steps, on_token=on_token)  # type: ignore[arg-type]
            await agreed.take_leave()
        finally:
            await agreed.close()
            await asyncio.gather(*beside)
        assert not taken_back, "a reader sees only what all agree on"
        look(world, agreed, ids)
        await end(world)

    fast(run)


def test_two_routes_agree_and_both_are_paid(models: Models, truth: dict[Sampling, list[int]], tmp_path: Path) -> None:
    def look(world: World, agreed: Agreement, ids: list[int]) -> None:
        assert ids == truth[SAMPLED]
        first, second = agreed.routes
        assert not owners(first) & owners(second)
        verdict = agreed.verdict
        assert verdict.checked == verdict.passed == 3 * 3 and len(verdict.nodes) == 6
        assert {check.how for check in verdict.checks} == {"routes"} and verdict.spans == [hop.span for hop in first]
        assert not verdict.attributions and not verdict.accusations and not any(verdict.withheld.values())
        for hop in (*first, *second):
            assert signed(world, world.nodes[hop.node]) == ROWS
            assert verdict.paid[hop.node] == ROWS * hop.span.units(3) * PRICE

    ask(models, tmp_path, 2, "agree=2", sampling=SAMPLED, look=look)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_of_two_the_liar_is_named_by_a_third_and_unpaid_for_the_window(
    models: Models, truth: dict[Sampling, list[int]], tmp_path: Path, layer: int
) -> None:
    name = f"{Span(layer, layer + 1)}#1"
    liars: list[Any] = []

    def look(world: World, agreed: Agreement, ids: list[int]) -> None:
        liar, verdict = node_of(world, name).address, agreed.verdict
        assert liars[0].lied and ids == truth[Sampling()]
        (accused,) = verdict.accusations
        assert accused.node == liar and accused.positions.first == WINDOW and len(set(accused.witnesses)) == 2
        assert liar not in accused.witnesses and verdict.failed == 1
        (why,) = verdict.attributions
        assert (why.cause, why.accused, why.avoided) == ("fraud", liar, (liar,))
        assert signed(world, world.nodes[liar]) == WINDOW, "the window before, and not a row of the one that it lied in"
        assert verdict.paid[liar] == WINDOW * Span(layer, layer + 1).units(3) * PRICE and verdict.withheld[liar] > 0
        assert all(liar not in {hop.node for hop in route} for route in agreed.routes)
        assert not owners(agreed.routes[0]) & owners(agreed.routes[1])
        for node in world.nodes.values():
            if node.address in {hop.node for route in agreed.routes for hop in route}:
                assert signed(world, node) >= ROWS, "whoever is honest is paid in full"

    ask(models, tmp_path, 3, "agree=2", lambda world: liars.append(corrupt(node_of(world, name), LIES_FROM)),
        routes=[[f"{Span(at, at + 1)}#{copy}" for at in range(3)] for copy in (0, 1)], look=look)  # fmt: skip


def test_of_three_the_one_that_stands_alone_is_expelled_without_a_witness(
    models: Models, truth: dict[Sampling, list[int]], tmp_path: Path
) -> None:
    name = f"{Span(1, 2)}#2"

    def look(world: World, agreed: Agreement, ids: list[int]) -> None:
        liar = node_of(world, name).address
        assert ids == truth[Sampling()]
        (accused,) = agreed.verdict.accusations
        others = {node_of(world, f"{Span(1, 2)}#{copy}").address for copy in (0, 1)}
        assert accused.node == liar and set(accused.witnesses) == others
        assert signed(world, world.nodes[liar]) == WINDOW
        stand_in = node_of(world, f"{Span(1, 2)}#3")
        assert agreed.routes[2][1].node == stand_in.address and stand_in.opened == 1, "no third was asked"

    ask(models, tmp_path, 4, "agree=3", lambda world: corrupt(node_of(world, name), LIES_FROM),
        routes=[[f"{Span(at, at + 1)}#{copy}" for at in range(3)] for copy in (0, 1, 2)], look=look)  # fmt: skip


def test_a_lost_hop_of_one_route_disturbs_neither_the_other_nor_the_reader(
    models: Models, truth: dict[Sampling, list[int]], tmp_path: Path
) -> None:
    lost: list[Address] = []

    async def kill(world: World, agreed: Agreement) -> None:
        lost.append(agreed.routes[1][1].node)
        await world.nodes[lost[0]].kill()

    def look(world: World, agreed: Agreement, ids: list[int]) -> None:
        assert ids == truth[Sampling()]
        assert [old for old, _, _ in agreed.verdict.replaced] == lost
        assert [one.cause for one in agreed.verdict.attributions] == ["overload"] and not agreed.verdict.accusations
        assert not owners(agreed.routes[0]) & owners(agreed.routes[1])
        for hop in agreed.routes[0]:
            assert signed(world, world.nodes[hop.node]) == ROWS, "the other route computed every row once"

    ask(models, tmp_path, 3, "agree=2", acts={8: kill}, look=look)


def test_drafts_are_for_all_routes(models: Models, truth: dict[Sampling, list[int]], tmp_path: Path) -> None:
    def look(world: World, agreed: Agreement, ids: list[int]) -> None:
        assert ids == truth[Sampling()] and not agreed.verdict.attributions

    ask(models, tmp_path, 2, "agree=2", speculate="lookup", look=look)


@pytest.mark.parametrize("liar", ["[0, 2)#0", "[1, 2)#0"])
def test_routes_that_are_cut_differently_are_audited_hop_by_hop(
    models: Models, truth: dict[Sampling, list[int]], tmp_path: Path, liar: str
) -> None:
    model, engines = models.found["fp32"]
    both = Inline(model.load(Span(0, 2)))

    def make(folder: Path) -> World:
        return World(model, {**engines, Span(0, 2): both}, 3, folder)

    def look(world: World, agreed: Agreement, ids: list[int]) -> None:
        assert ids == truth[Sampling()]
        assert [one.node for one in agreed.verdict.accusations] == [node_of(world, liar).address]
        assert signed(world, node_of(world, liar)) == WINDOW

    routes = [["[0, 2)#0", "[2, 3)#0"], ["[0, 1)#0", "[1, 2)#0", "[2, 3)#1"]]
    try:
        ask(models, tmp_path, 3, "agree=2", lambda world: corrupt(node_of(world, liar), LIES_FROM), routes=routes,
            make=make, look=look)  # fmt: skip
    finally:
        both.close()


def test_without_a_third_nobody_is_accused_and_both_are_avoided_and_unpaid(models: Models, tmp_path: Path) -> None:
    async def run() -> None:
        world = models.world(tmp_path, 2)
        liar = corrupt(node_of(world, "[1, 2)#1"), LIES_FROM)
        routes = [[f"{Span(at, at + 1)}#{copy}" for at in range(3)] for copy in (0, 1)]
        agreed = await agreement(world, "agree=2", routes)
        with pytest.raises(NoRoute, match=r"nobody else serves layers \[1, 2\).*shares no operator") as raised:
            await generate(agreed, PROMPT, TOKENS)  # type: ignore[arg-type]
        await agreed.close()
        assert liar.lied and raised.value.fields["start"] == 1
        verdict = agreed.verdict
        both = {node_of(world, f"[1, 2)#{copy}") for copy in (0, 1)}
        assert not verdict.accusations and {one.cause for one in verdict.attributions} == {"numerics"}
        assert {node for one in verdict.attributions for node in one.avoided} == {node.address for node in both}
        assert all(signed(world, node) == WINDOW for node in both)
        await end(world)

    fast(run)


def test_too_few_owners_are_told(models: Models, tmp_path: Path) -> None:
    async def run() -> None:
        world = models.world(tmp_path, 2)
        await node_of(world, "[1, 2)#1").kill()
        with pytest.raises(NoRoute, match=r"agree=2 takes 2 routes.*there are 1, and.*layers \[1, 2\)"):
            await agreement(world, "agree=2")
        await end(world)

    fast(run)
