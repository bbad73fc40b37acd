"""Speculation on the running network: the same tokens in fewer passes, also when a hop dies among the drafts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import pytest

from conftest import Running
from tallystick import AsyncClient, Sampling, Token
from tallystick.generation import Answer
from tallystick.speculation.pace import Pace
from tallystick_protocol.types import WINDOW

QUOTING = (
    "The function returns a list of names. The function returns a list of values. The function returns a list of names."
    " The function returns a list of values. The function returns"
)
TOKENS = 48
OPTIONS: dict[str, Any] = {"max_tokens": TOKENS, "ignore_eos": True}
SEEDED = Sampling(temperature=0.8, top_p=0.95, seed=5)


class Told:
    """Knows the answer, and is wrong now and then."""

    def __init__(self, answer: Answer) -> None:
        self._ids = answer.prompt_ids + answer.ids
        self._chance = random.Random(1)

    def propose(self, ids: Sequence[int], k: int) -> list[int]:
        right = self._ids[len(ids) : len(ids) + k]
        return [token if self._chance.random() < 0.85 else token ^ 1 for token in right]


@pytest.fixture(scope="module", params=[Sampling(), SEEDED], ids=["greedy", "seeded"])
async def plain(request: pytest.FixtureRequest, running: Running) -> tuple[Sampling, Answer]:
    sampling: Sampling = request.param
    async with AsyncClient(running.key, running.net.settings()) as client:
        return sampling, await client.generate(QUOTING, model=running.id, verify="off", sampling=sampling, **OPTIONS)


async def test_wrong_and_right_drafts_change_nothing_and_only_rows_are_paid(
    running: Running, plain: tuple[Sampling, Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pace, "drafts", lambda _, room: min(room, 4))  # what pays depends on the machine
    sampling, expected = plain
    async with AsyncClient(running.key, running.net.settings()) as client:
        answer = await client.generate(
            QUOTING, model=running.id, verify="full", sampling=sampling, speculate=Told(expected), **OPTIONS
        )
    assert answer.ids == expected.ids
    assert answer.drafted > answer.accepted > TOKENS / 3
    verdict = answer.verdict
    rows = len(answer.prompt_ids) + TOKENS - 1
    assert verdict.failed == 0 and verdict.passed >= 3 * -(-rows // WINDOW)
    assert not any(verdict.withheld.values()) and not verdict.replaced
    computed = rows + answer.drafted - answer.accepted
    for hop in answer.route:
        units = hop.span.units(running.manifest.layers) * hop.offer.price
        assert rows <= verdict.paid[hop.node] / units <= computed + 1


async def test_a_text_that_repeats_itself_takes_fewer_passes(running: Running) -> None:
    async with AsyncClient(running.key, running.net.settings()) as client:
        plain = await client.generate(QUOTING, model=running.id, verify="off", **OPTIONS)
        quick = await client.generate(QUOTING, model=running.id, verify="off", speculate="lookup", **OPTIONS)
    assert quick.ids == plain.ids and plain.drafted == 0
    assert quick.accepted, "of so many tokens no pass was needed"
    assert quick.drafted - quick.accepted <= TOKENS / 2


async def test_a_hop_that_dies_among_drafts_is_replaced_and_the_tokens_are_unchanged(
    running: Running, plain: tuple[Sampling, Answer]
) -> None:
    sampling, expected = plain
    hop = 0 if sampling.temperature else 1
    async with AsyncClient(running.key, running.net.settings()) as client:
        stream = client.stream(
            QUOTING, model=running.id, verify="off", sampling=sampling, speculate=Told(expected), **OPTIONS
        )
        count = 0
        async for event in stream:
            count += isinstance(event, Token)
            if count == 11:
                await asyncio.to_thread(running.node(stream.session_route[hop].node).process.kill)
        assert stream.answer.ids == expected.ids
        assert len(stream.answer.verdict.replaced) == 1 and stream.answer.accepted
    await asyncio.to_thread(running.revive)
