"""The ring on the running network: the same tokens, without the client's transit; broken, lied in, and mended."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import Running
from harness.waiting import eventually
from tallystick import AsyncClient, Retracted, Sampling, Token
from tallystick.generation import Answer
from tallystick.session.ring import AHEAD, Ring
from tallystick.verdict import Verdict
from tallystick_devnet.localnet import READY_TIMEOUT_S
from tallystick_protocol.errors import ConfigError
from tallystick_protocol.types import WINDOW

PROMPT = "The function returns a list of"
TOKENS = 40
SEEDED = Sampling(temperature=0.9, top_p=0.95, seed=7)
OPTIONS: dict[str, Any] = {"max_tokens": TOKENS, "ignore_eos": True}
LIAR = Path(__file__).parent.parent / "faults" / "ring_liar.py"


@pytest.fixture(scope="module")
async def plain(running: Running) -> dict[Sampling, Answer]:
    async with AsyncClient(running.key, running.net.settings()) as client:
        return {
            sampling: await client.generate(PROMPT, model=running.id, verify="off", sampling=sampling, **OPTIONS)
            for sampling in (Sampling(), SEEDED)
        }


@pytest.mark.parametrize("sampling", [Sampling(), SEEDED], ids=["greedy", "seeded"])
async def test_the_tokens_the_receipts_and_the_payment_are_those_of_the_pipeline(
    running: Running, plain: dict[Sampling, Answer], sampling: Sampling
) -> None:
    async with AsyncClient(running.key, running.net.settings()) as client:
        answer = await client.generate(
            PROMPT, model=running.id, verify="full", sampling=sampling, mode="ring", **OPTIONS
        )
    assert answer.ids == plain[sampling].ids
    verdict = answer.verdict
    rows = len(answer.prompt_ids) + TOKENS - 1
    assert verdict.failed == 0 and verdict.passed == 3 * -(-rows // WINDOW)
    assert not verdict.replaced and not any(verdict.withheld.values())
    for hop in answer.route:
        assert verdict.paid[hop.node] == rows * hop.span.units(running.manifest.layers) * hop.offer.price


async def test_tokens_go_round_without_the_client_but_not_too_far_and_nothing_is_signed_without_it(
    running: Running,
) -> None:
    async with AsyncClient(running.key, running.net.settings()) as client:
        record, manifest = await client.model(running.id)
        session = await client.open_session(record, manifest, 400, Verdict("off"))
        ring = Ring(session, Sampling(), [], 400)
        ids = list(range(5, 25))
        try:
            await ring.start(ids)
            for _ in range(5):  # until the ring is closed: until then it is the client that brings the tokens
                ids += await ring.decide(ids)
                await ring.go_on(ids)
            rows = session.results.rows
            last = ring.until - 1
            confirmed = len(session.ids)
            await eventually("rows that the client has asked nobody for", lambda: last in rows)
            assert last == 20 + AHEAD - 1 and len(session.ids) == confirmed and max(rows) == last
            covered = [hop.standing.covered for hop in session.hops]
            assert covered == [0, 0, 0], "the window is whole, but the client has not sent its ids"
            while len(ids) <= last:  # everything is there: it only has to be confirmed
                ids += await ring.decide(ids)
                await session.confirm(ids[-1:])
            await ring.stop(ids)
            await session.finish()
            assert [hop.standing.covered for hop in session.hops] == [len(session.ids)] * 3
        finally:
            await ring.close()
            await session.close()


@pytest.mark.parametrize("hop", [0, pytest.param(1, marks=pytest.mark.nightly), 2])
async def test_a_killed_hop_is_replaced_and_the_tokens_are_unchanged(
    running: Running, plain: dict[Sampling, Answer], hop: int
) -> None:
    async with AsyncClient(running.key, running.net.settings()) as client:
        stream = client.stream(PROMPT, model=running.id, verify="off", sampling=SEEDED, mode="ring", **OPTIONS)
        count = 0
        async for event in stream:
            count += isinstance(event, Token)
            if count == 9 + hop:
                await asyncio.to_thread(running.node(stream.session_route[hop].node).process.kill)
    assert stream.answer.ids == plain[SEEDED].ids
    assert len(stream.answer.verdict.replaced) == 1 and not any(stream.answer.verdict.withheld.values())
    await asyncio.to_thread(running.revive)


@pytest.mark.parametrize("way", ["tells", "hides"])
async def test_a_last_hop_that_sends_another_token_round_is_replaced_and_the_answer_is_right(
    running: Running, plain: dict[Sampling, Answer], way: str
) -> None:
    honest = plain[Sampling()]
    liar = running.node(honest.route[2].node)
    await asyncio.to_thread(liar.process.stop)
    cheap = ["--price", str(honest.route[2].offer.price // 2)]
    running.net.restart(liar, running.model, (sys.executable, str(LIAR), way), cheap)
    try:
        await asyncio.to_thread(liar.wait)
        async with AsyncClient(running.key, running.net.settings()) as client:
            stream = client.stream(PROMPT, model=running.id, verify="off", mode="ring", **OPTIONS)
            ids: list[int] = []
            async for event in stream:
                if isinstance(event, Retracted):
                    del ids[len(ids) - event.num_tokens :]
                else:
                    ids.append(event.id)
        await asyncio.to_thread(liar.process.wait_for, "fault: a false token", READY_TIMEOUT_S)
        answer = stream.answer
        assert answer.ids == ids == honest.ids
        code = "corrupt_result" if way == "tells" else "link_mismatch"
        assert [(lost, why) for lost, _, why in answer.verdict.replaced] == [(liar.address, code)]
        assert not any(amount for node, amount in answer.verdict.withheld.items() if node != liar.address)
    finally:
        await asyncio.to_thread(liar.process.stop)
        running.net.restart(liar, running.model)
        await asyncio.to_thread(liar.wait)


async def test_modes_that_mean_nothing_are_refused(running: Running) -> None:
    async with AsyncClient(running.key, running.net.settings()) as client:
        with pytest.raises(ConfigError, match="not pipeline, ring or auto"):
            client.stream(PROMPT, mode="star")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="speculate='off'"):
            client.stream(PROMPT, mode="ring", speculate="auto")
