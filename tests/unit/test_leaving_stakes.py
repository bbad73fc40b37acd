"""A node whose stake leaves in mid-session: it is moved away from, and whoever takes its place still stakes."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest

from harness import samples
from harness.small_models import Models, fast
from harness.small_world import Node, World, audited, generate
from tallystick.routing.candidates import Expected
from tallystick.session import stakes
from tallystick.session.session import Session
from tallystick.verdict import Policy
from tallystick_protocol.chain.reads import NodeRecord
from tallystick_protocol.errors import ChainError
from tallystick_protocol.types import Address, ModelId, Span, Wei

PROMPT = [5 + 7 * i % 90 for i in range(40)]
TOKENS, EARLY = 40, 8
LOOK_S = 0.05


class Registry:
    """What the chain says of stakes: whose are leaving. refuses: it does not answer."""

    def __init__(self) -> None:
        self.leaving: set[Address] = set()
        self.refuses = False
        self.asked: list[set[Address]] = []

    async def unstaked(self, nodes: Collection[Address]) -> dict[Address, str]:
        self.asked.append(set(nodes))
        await asyncio.sleep(0.01)
        if self.refuses:
            raise ChainError("it does not answer")
        return {node: "its stake of 7 token units is leaving" for node in nodes if node in self.leaving}


def named(world: World, index: int, copy: int) -> Node:
    return world.nodes[samples.address(f"{world.spans[index]}#{copy}")]


def play(
    models: Models, folder: Path, policy: Policy, leave: list[tuple[int, int]], copies: int = 3, refuses: bool = False
) -> tuple[World, Session, list[int], Registry]:
    """An answer of which the stakes of some nodes (index of the span, copy) leave after a few tokens. Nodes of copy 2
    come later than the others."""

    async def run() -> tuple[World, Session, list[int], Registry]:
        folder.mkdir()
        world, registry = models.world(folder, copies), Registry()
        registry.refuses = refuses
        session = await world.prepare(policy, 60.0)
        session.setting = replace(session.setting, unstaked=registry.unstaked)
        late = {node.address for node in world.nodes.values() if node.name.endswith("#2")}
        session.lost |= late
        await session.open(audited(session))
        session.lost -= late

        def on_token(count: int) -> None:
            if count >= EARLY:
                registry.leaving |= {named(world, *place).address for place in leave}

        ids = await generate(session, PROMPT, TOKENS, on_token=on_token)
        await session.close()
        for node in world.nodes.values():
            await node.kill()
        return world, session, ids, registry

    return fast(run)


@pytest.fixture(scope="module")
def truth(models: Models, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    return play(models, tmp_path_factory.mktemp("truth") / "world", "off", [])[2]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stakes, "STAKES_S", LOOK_S)


def test_a_hop_is_replaced_by_one_that_stakes_and_nothing_is_held_against_it(
    models: Models, tmp_path: Path, truth: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    world, session, ids, registry = play(models, tmp_path / "leave", "off", [(1, 0), (1, 1)])
    assert ids == truth
    assert session.verdict.replaced == [(named(world, 1, 0).address, named(world, 1, 2).address, "unstaked")]
    assert not session.verdict.attributions and not session.verdict.accusations
    assert not any(session.verdict.withheld.values())
    assert "its stake of 7 token units is leaving" in caplog.text
    reputation = session.setting.reputation
    left, never = (reputation.expect(named(world, 1, copy).address, Expected(), 1).failure for copy in (0, 1))
    assert left == never
    assert registry.asked[0] == {named(world, index, 0).address for index in range(3)}


def test_an_auditor_is_changed(models: Models, tmp_path: Path, truth: list[int]) -> None:
    world, session, ids, _ = play(models, tmp_path / "leave", "full", [(2, 1)])
    assert ids == truth and not session.verdict.replaced
    assert [audit.remote.node for audit in session.audits if audit.index == 2] == [named(world, 2, 2).address]
    assert session.verdict.failed == 0 and session.verdict.checked >= 3 * 3, "every window, some of them by both"


@pytest.mark.parametrize(("copies", "refuses"), [(1, False), (2, True)])
def test_without_another_node_or_a_chain_that_answers_it_goes_on(
    models: Models, tmp_path: Path, truth: list[int], copies: int, refuses: bool
) -> None:
    _, session, ids, registry = play(models, tmp_path / "leave", "off", [(0, 0)], copies, refuses)
    assert ids == truth and not session.verdict.replaced
    assert len(registry.asked) > 1, "and looks again"


def test_what_the_chain_says_of_a_node() -> None:
    model, other = ModelId(samples.digest("model")), ModelId(samples.digest("other"))
    node = NodeRecord(samples.address("node"), Wei(5), Wei(2), model, Span(0, 1), samples.address("payee"), jailed=True)
    assert node.why_gone(model) == ""  # some of its stake is leaving, and it was silent for long: it still answers
    assert node.why_gone(other) == "it serves another model now"
    assert replace(node, active=Wei(0)).why_gone(model) == "its stake of 2 token units is leaving"
    assert replace(node, active=Wei(0), leaving=Wei(0)).why_gone(model) == "it has no stake"
