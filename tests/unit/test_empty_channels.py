"""A channel that is used up in mid-answer: the node waits, the client fills it, nothing is charged twice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness import samples
from harness.small_models import Models, fast
from harness.small_world import PRICE, Node, World, generate
from tallystick.session.session import Session
from tallystick_node.session.billing import FUNDS_TIMEOUT_S
from tallystick_node.till import Funds
from tallystick_protocol.chain.reads import ChannelFunds
from tallystick_protocol.errors import ChainError, InsufficientFunds
from tallystick_protocol.types import Address, Wei
from tallystick_protocol.vouchers import charge

PROMPT = [5 + 7 * i % 90 for i in range(40)]
TOKENS = 30
HOP = 1


@dataclass
class Channels:
    """What the channels hold, on a chain of which somebody may have no tokens left. deposits: all that were made."""

    world: World
    has_tokens: bool = True
    amounts: dict[Address, int] = field(default_factory=dict)
    deposits: list[tuple[Address, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.world.chain.funds = self.funds  # type: ignore[method-assign]
        self.world.purse._wallet = SimpleNamespace(fund=self.fund)  # type: ignore[assignment]

    def funds(self, _: Address, node: Address) -> ChannelFunds:
        amount = Wei(self.amounts.get(node, 10**24))
        return ChannelFunds(amount, amount, Wei(0))

    def fund(self, _: Address, deposits: list[tuple[Address, Wei]]) -> None:
        if not self.has_tokens:
            raise ChainError("there are no tokens")
        for node, amount in deposits:
            self.amounts[node] = self.amounts.get(node, 10**24) + amount
            self.deposits.append((node, amount))

    def use_up(self, node: Node, rows: int) -> None:
        """Somebody else with the client's key has spent all but what so many rows cost."""
        span = node.engine.model.span
        self.amounts[node.address] = charge(span, node.engine.model.manifest.layers, PRICE, rows)
        node.shop.lookups._funds.clear()


def play(
    models: Models, folder: Path, rows: int | None, prepare: Callable[[Channels, Node], Any] = lambda *_: None
) -> tuple[Session, Node, Channels, list[int], tuple[int, int]]:
    """An answer over three hops, of which one's channel holds so many rows once it is open."""

    async def run() -> tuple[Session, Node, Channels, list[int], tuple[int, int]]:
        folder.mkdir()
        world = models.world(folder, 1)
        channels = Channels(world)
        node = world.nodes[samples.address(f"{world.spans[HOP]}#0")]
        session = await world.session("off")
        try:
            if rows is not None:
                channels.use_up(node, rows)
            prepare(channels, node)
            ids = await generate(session, PROMPT, TOKENS)
            account = node.till.account(world.key.address)
            return session, node, channels, ids, (account.owed, account.signed)
        finally:
            await session.close()
            for one in world.nodes.values():
                await one.kill()

    return fast(run)


@pytest.fixture(scope="module")
def truth(models: Models, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[int], tuple[int, int]]:
    _, _, _, ids, account = play(models, tmp_path_factory.mktemp("truth") / "world", None)
    return ids, account


def test_the_client_fills_it_and_the_answer_goes_on(
    models: Models, tmp_path: Path, truth: tuple[list[int], tuple[int, int]], caplog: pytest.LogCaptureFixture
) -> None:
    session, node, channels, ids, account = play(models, tmp_path / "world", 50)
    assert (ids, account) == truth, "the same tokens for the same money"
    assert account[0] == account[1] == session.verdict.paid[node.address]
    assert not session.verdict.replaced and not session.verdict.attributions
    assert [to for to, _ in channels.deposits] == [node.address], "filled once"
    assert "is used up" in caplog.text


def test_somebody_else_may_fill_it_while_the_node_waits(
    models: Models, tmp_path: Path, truth: tuple[list[int], tuple[int, int]], caplog: pytest.LogCaptureFixture
) -> None:
    def prepare(channels: Channels, node: Node) -> None:
        channels.has_tokens = False
        late = FUNDS_TIMEOUT_S / 2
        asyncio.get_running_loop().call_later(late, channels.amounts.__setitem__, node.address, 10**24)

    session, node, channels, ids, account = play(models, tmp_path / "world", 50, prepare)
    assert (ids, account) == truth and not channels.deposits
    assert not session.verdict.replaced
    assert f"tallystick fund --node {node.address}" in caplog.text


def test_it_ends_with_what_is_missing_when_nobody_does(models: Models, tmp_path: Path) -> None:
    def prepare(channels: Channels, _: Node) -> None:
        channels.has_tokens = False

    with pytest.raises(InsufficientFunds, match="tallystick fund"):
        play(models, tmp_path / "world", 50, prepare)


def test_for_a_node_that_never_sees_the_money_it_is_put_there_once(models: Models, tmp_path: Path) -> None:
    made: list[Channels] = []

    def prepare(channels: Channels, node: Node) -> None:
        made.append(channels)
        before, lookups = channels.funds(node.address, node.address), node.shop.lookups
        lookups.remembered = lambda *_: None  # type: ignore[method-assign]
        lookups.funds = lambda *_: Funds(before.confirmed, before.latest, before.paid)  # type: ignore[method-assign]

    with pytest.raises(InsufficientFunds):
        play(models, tmp_path / "world", 50, prepare)
    assert len(made[0].deposits) == 1
