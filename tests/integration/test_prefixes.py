"""Prefix reuse on the running network: a long system prompt is computed and paid once, and only for whoever paid."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from conftest import Running
from tallystick import AsyncClient
from tallystick.generation import Answer
from tallystick.prefixes import Prefix, Prefixes
from tallystick_protocol.types import WINDOW, Address

SYSTEM = [5 + at * 7 % 300 for at in range(3 * WINDOW + 5)]
FIRST, SECOND = [*SYSTEM, 11, 12, 13], [*SYSTEM, 21, 22]
TOKENS = 10
OPTIONS: dict[str, Any] = {"max_tokens": TOKENS, "ignore_eos": True, "speculate": "off", "mode": "pipeline"}


async def ask(client: AsyncClient, running: Running, ids: list[int], verify: str = "off") -> Answer:
    stream = client.stream(ids, model=running.id, verify=verify, **OPTIONS)  # type: ignore[arg-type]
    async for _ in stream:
        pass
    return stream.answer


async def computed(client: AsyncClient, running: Running) -> dict[Address, int]:
    """Rows that each node has computed so far."""
    rows = {}
    for node in running.nodes:
        text = (await client._peers.get(f"{node.url}/metrics", 1 << 20, 5.0)).decode()
        found = re.search(r"^tallystick_iteration_tokens_total ([0-9.e+]+)$", text, re.MULTILINE)
        assert found is not None
        rows[node.address] = int(float(found[1]))
    return rows


@pytest.fixture(scope="module")
async def payer(running: Running) -> AsyncIterator[AsyncClient]:
    """One for all tests: funding channels takes seconds."""
    async with AsyncClient(running.key, running.net.settings()) as client:
        yield client


@pytest.fixture
def client(payer: AsyncClient) -> AsyncClient:
    """The same, having nothing to reuse."""
    payer.prefixes = Prefixes()
    payer.banned.clear()
    return payer


@pytest.fixture(scope="module")
async def plain(running: Running, payer: AsyncClient) -> Answer:
    """SECOND, with nothing to reuse."""
    payer.prefixes = Prefixes()
    return await ask(payer, running, SECOND)


@pytest.mark.parametrize("verify", [pytest.param("off", marks=pytest.mark.nightly), "full"])
async def test_what_two_prompts_begin_with_is_computed_and_paid_once(
    running: Running, client: AsyncClient, plain: Answer, verify: str
) -> None:
    first = await ask(client, running, FIRST, verify)
    before = await computed(client, running)
    second = await ask(client, running, SECOND, verify)
    after = await computed(client, running)
    assert second.ids == plain.ids
    route = [hop.node for hop in second.route]
    assert route == [hop.node for hop in first.route]
    fresh = len(SECOND) - len(SYSTEM) + TOKENS - 1
    for hop in second.route:
        assert after[hop.node] - before[hop.node] == fresh
        assert second.verdict.paid[hop.node] == fresh * hop.span.units(running.manifest.layers) * hop.offer.price
    assert not any(second.verdict.withheld.values()) and not second.verdict.replaced
    rows = len(SECOND) + TOKENS - 1
    windows = 3 * -(-rows // WINDOW)
    assert second.verdict.receipts == windows, "every window is signed for, and linked to the one before"
    assert (second.verdict.passed, second.verdict.failed) == (windows if verify == "full" else 0, 0)
    if verify == "full":  # who recomputes, recomputes all
        auditors = {check.auditor for check in second.verdict.checks}
        assert {after[node] - before[node] for node in auditors} == {rows}


async def test_a_conversation_goes_on_where_it_was(running: Running, client: AsyncClient) -> None:
    ids = list(FIRST)
    for _ in range(2):
        answer = await ask(client, running, ids)
        ids += [*answer.ids, 31, 32]
        assert len(client.prefixes) == 1, "the longer session has taken the place of the shorter one"
    hop = answer.route[0]
    paid = answer.verdict.paid[hop.node] // (hop.span.units(running.manifest.layers) * hop.offer.price)
    assert paid == 3 + TOKENS - 1, "the last token, which was never fed, and two more"
    client.prefixes = Prefixes()
    assert (await ask(client, running, ids[: -2 - TOKENS])).ids == answer.ids


async def test_nobody_else_gets_what_somebody_paid_for(running: Running, client: AsyncClient, plain: Answer) -> None:
    await ask(client, running, FIRST)
    key, _ = running.net.client_key("another")
    async with AsyncClient(key, running.net.settings()) as thief:
        thief.prefixes = client.prefixes
        before = await computed(client, running)
        answer = await ask(thief, running, SECOND)
        after = await computed(client, running)
    assert answer.ids == plain.ids
    rows = len(SECOND) + TOKENS - 1
    for hop in answer.route:
        assert after[hop.node] - before[hop.node] == rows
        assert answer.verdict.paid[hop.node] == rows * hop.span.units(running.manifest.layers) * hop.offer.price
    assert not answer.verdict.replaced, "a node that does not hand it over is no worse for it"


NIGHTLY = [pytest.param(hop, marks=pytest.mark.nightly) for hop in (0, 2)]


@pytest.mark.parametrize("missing", [1, *NIGHTLY])
async def test_where_one_hop_has_it_no_more_all_rows_are_fed(
    running: Running, client: AsyncClient, plain: Answer, missing: int
) -> None:
    """Two sessions over routes that differ in one hop; of the one's rows, that hop of the other has nothing."""
    await ask(client, running, FIRST)
    (here,) = (prefix for prefix, _ in client.prefixes.find(form_of(client), SECOND))
    client.banned.add(here.hops[missing][0])
    client.prefixes.forget(here.session)
    await ask(client, running, FIRST)
    (there,) = (prefix for prefix, _ in client.prefixes.find(form_of(client), SECOND))
    mixed = list(here.hops)
    mixed[missing] = there.hops[missing]
    client.prefixes.forget(there.session)
    client.prefixes.remember(replace(here, hops=tuple(mixed)))
    answer = await ask(client, running, SECOND)
    assert [hop.node for hop in answer.route] == [node for node, _ in mixed]
    assert answer.ids == plain.ids and not answer.verdict.replaced
    assert [found.session for found, _ in client.prefixes.find(form_of(client), SECOND)] != [here.session]


async def test_kept_rows_are_no_open_session(running: Running, client: AsyncClient) -> None:
    await ask(client, running, FIRST)
    deadline = time.monotonic() + 20.0
    while any([await busy(client, node.url) for node in running.nodes]):
        assert time.monotonic() < deadline, "a node still counts what it only keeps"
        await asyncio.sleep(0.05)


async def busy(client: AsyncClient, url: str) -> bool:
    status = (await client._peers.info(url))["status"]
    return bool(status["sessions"] or status["reserved_bytes"])


def form_of(client: AsyncClient) -> Any:
    kept: list[Prefix] = [prefix for prefix, _ in client.prefixes._kept.values()]
    return kept[-1].form
