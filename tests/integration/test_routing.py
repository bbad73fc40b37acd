"""Routes on the running network: spans left early and entered late, what a route is said to take, who loses traffic."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from conftest import Running
from tallystick import AsyncClient
from tallystick.cli import main
from tallystick.routing.candidates import Weights
from tallystick.settings import Settings
from tallystick.verdict import Verdict
from tallystick_devnet.localnet import LocalNode
from tallystick_protocol.errors import Unreachable, WrongLayers
from tallystick_protocol.types import Span

PROMPT = "The function returns a list of"
TOKENS = 34
SLOW = (sys.executable, str(Path(__file__).parents[1] / "faults" / "slow_node.py"))


@dataclass(frozen=True, slots=True)
class Overlapping:
    """Two cheap nodes whose span begins and ends in the middle of others'."""

    nodes: list[LocalNode]
    span: Span


@pytest.fixture(scope="module")
async def overlapping(running: Running) -> AsyncIterator[Overlapping]:
    span = Span(1, running.manifest.layers - 1)
    running.net.prepare(2)
    cheap = ["--price", "1"]
    nodes = [running.net.add_node(running.model, span, settings=cheap) for _ in range(2)]
    for node in nodes:
        await asyncio.to_thread(node.wait)
    yield Overlapping(nodes, span)
    for node in nodes:
        await asyncio.to_thread(node.process.stop)


def client_of(running: Running, folder: Path, seconds_per_wei: float = 1e-9) -> AsyncClient:
    return AsyncClient(running.key, replace(running.net.settings(), cache=folder, weights=Weights(seconds_per_wei)))


async def test_spans_are_left_early_and_entered_late_with_every_part_recomputed_by_others(
    running: Running, overlapping: Overlapping, tmp_path: Path
) -> None:
    ends = [Span(0, 1), overlapping.span, Span(running.manifest.layers - 1, running.manifest.layers)]
    cheap = {node.address for node in overlapping.nodes}
    async with client_of(running, tmp_path) as client:
        answer = await client.generate(PROMPT, max_tokens=TOKENS, model=running.id, verify="full", ignore_eos=True)
        client.banned.update(cheap)
        usual = await client.generate(PROMPT, max_tokens=TOKENS, model=running.id, verify="off", ignore_eos=True)
    assert [hop.span for hop in answer.route] == ends
    assert [hop.span for hop in usual.route] == running.spans
    assert answer.ids == usual.ids
    assert answer.verdict.failed == 0 and {check.span for check in answer.verdict.checks} == set(ends)
    rows = len(answer.prompt_ids) + TOKENS - 1
    for hop in answer.route:
        due = rows * hop.span.units(running.manifest.layers) * hop.offer.price
        assert answer.verdict.paid[hop.node] == due, "a part is paid for its own layers"


@pytest.mark.nightly
async def test_a_part_that_is_lost_is_taken_over_by_who_covers_it(
    running: Running, overlapping: Overlapping, tmp_path: Path
) -> None:
    async with client_of(running, tmp_path) as client:
        record, manifest = await client.model(running.id)
        verdict = Verdict("off")
        session = await client.open_session(record, manifest, 80, verdict)
        before = list(session.route)
        ids = list(range(20, 60))
        await session.feed(ids[:36])
        first = await session.result(35)
        session.hops[0].failure = Unreachable("as if its process had died", hop=before[0].node)
        await session.feed(ids[36:])
        second = await session.result(39)
        await client.finish(session, "off")
        await session.close()
        client.banned.update({node.address for node in overlapping.nodes})
        usual = await client.open_session(record, manifest, 80, Verdict("off"))
        await usual.feed(ids, [index in (35, 39) for index in range(40)])
        expected = await usual.result(35), await usual.result(39)
        await usual.close()
    assert before[0].span == session.route[0].span == Span(0, 1)
    assert session.route[0].node != before[0].node
    assert (first, second) == expected


async def test_layers_that_a_node_has_not_are_refused(
    running: Running, overlapping: Overlapping, tmp_path: Path
) -> None:
    async with client_of(running, tmp_path) as client:
        record, manifest = await client.model(running.id)
        survey = await client.network.survey(record)
        node = next(c for c in survey.candidates if c.node == overlapping.nodes[0].address)
        assert node.serves_parts and node.claimed.layer_s > 0
        stolen = replace(node, part=Span(0, 2))
        session = await client.open_session(record, manifest, 8, Verdict("off"))
        with pytest.raises(WrongLayers, match=r"serves layers \[1, "):
            await session.openings.connect(stolen, session.openings.opening(0))
        await session.close()


@pytest.mark.nightly
async def test_a_node_that_advertises_what_it_does_not_deliver_loses_its_session_and_its_traffic(
    running: Running, overlapping: Overlapping, tmp_path: Path
) -> None:
    """It is chosen for lack of others, left in the middle of the session, and not used again, by a later client either.

    The rows are those of a session that was never moved.
    """
    liar, honest = overlapping.nodes
    await asyncio.to_thread(liar.process.stop)
    running.net.restart(liar, running.model, SLOW)
    await asyncio.to_thread(liar.wait)
    others = {honest.address, *(node.address for node in running.nodes if node.span == running.spans[1])}
    ids = list(range(20, 130))
    async with client_of(running, tmp_path, 0.0) as client:
        record, manifest = await client.model(running.id)
        client.banned.update(others)
        verdict = Verdict("off")
        session = await client.open_session(record, manifest, 128, verdict)
        (lie,) = [hop for hop in session.route if hop.node == liar.address]
        assert lie.claimed.layer_s < 1e-4, "it says that it is the fastest"
        session.avoid -= others
        client.banned.difference_update(others)
        rows: list[bytes] = []
        moved_at = None
        while len(rows) < len(ids) and len(rows) != moved_at:
            await session.feed([ids[len(rows)]])
            rows.append(await session.result(len(rows)))
            if moved_at is None and liar.address not in {hop.node for hop in session.route}:
                moved_at = len(rows) + 2
        assert moved_at is not None
        assert [(old, why) for old, _, why in verdict.replaced] == [(liar.address, "slow")]
        await client.finish(session, "off")
        await session.close()
        usual = await client.open_session(record, manifest, 128, Verdict("off"))
        assert liar.address not in {hop.node for hop in usual.route}
        await usual.feed(ids[: len(rows)], [True] * len(rows))
        assert [await usual.result(position) for position in range(len(rows))] == rows
        await client.finish(usual, "off")
        await usual.close()
    async with client_of(running, tmp_path, 0.0) as client:
        _, route = await client.route(running.id)
        assert liar.address not in {hop.node for hop in route.hops}


def test_many_nodes_are_read_from_the_chain_at_once(
    running: Running, overlapping: Overlapping, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = running.net.chain.chain()
    nodes = [node.address for node in [*running.nodes, *overlapping.nodes]]
    expected = [chain.node(node) for node in nodes]
    assert {record.span for record in expected} == {*running.spans, overlapping.span}
    with monkeypatch.context() as patched:
        patched.setattr(chain, "node", None)  # nobody is read alone
        assert chain.nodes(nodes) == expected
    monkeypatch.setattr(chain.web3.provider, "make_batch_request", lambda _: {"error": "no batches here"})
    assert chain.nodes(nodes) == expected


def test_the_plan_is_told(running: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings: Settings = running.net.settings()
    common = [
        "--rpc", settings.rpc, "--book", str(settings.book), "--key", str(running.keystore),
        "--password-file", str(running.keystore.parent / "password"), "--source", settings.sources[0],
        "plan", "--model", running.id, "--prompt", "100",
    ]  # fmt: skip
    assert main([*common, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["hops"][0]["layers"][0] == 0
    assert all(hop["standby"] is not None and hop["standby_is_disjoint"] for hop in told["hops"])
    assert told["step_ms"] > 0 and told["cost_s_per_token"] > 0
    assert main(common) == 0
    text = capsys.readouterr().out
    assert "ms expected for a token" in text and "would take its place (another operator's)" in text


