"""What a developer touches: the audit policy, the synchronous client, the command line."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from conftest import Running
from tallystick import AsyncClient, Client, Token
from tallystick.cli import main

PROMPT = "The function returns a list of"


def shell(running: Running, *arguments: str) -> list[str]:
    """A command line as a person of this network would have it."""
    local = running.net.chain
    return [
        "--rpc", local.rpc, "--book", str(local.book), "--key", str(running.keystore),
        "--password-file", str(running.keystore.parent / "password"), "--source", running.net.source, *arguments,
    ]  # fmt: skip


async def test_under_the_audit_policy_a_secret_coin_has_one_span_recomputed(running: Running) -> None:
    settings = replace(running.net.settings(), audit_probability=1.0)
    async with AsyncClient(running.key, settings) as client:
        answer = await client.generate(PROMPT, max_tokens=12, model=running.id, verify="audit", ignore_eos=True)
    assert len({check.span for check in answer.verdict.checks}) == 1
    assert answer.verdict.failed == 0 and answer.verdict.passed == 1
    check = answer.verdict.checks[0]
    assert check.auditor not in {hop.node for hop in answer.route} and check.how == "hash"


async def test_the_synchronous_client_gives_the_same_tokens_as_the_asynchronous_one(running: Running) -> None:
    async with AsyncClient(running.key, running.net.settings()) as client:
        expected = await client.generate(PROMPT, max_tokens=10, model=running.id, verify="off", ignore_eos=True)

    def use() -> tuple[list[int], list[int], str]:
        with Client(running.key, running.net.settings()) as client:
            answer = client.generate(PROMPT, max_tokens=10, model=running.id, verify="off", ignore_eos=True)
            events = list(client.stream(PROMPT, max_tokens=10, model=running.id, verify="off", ignore_eos=True))
            ids = [event.id for event in events if isinstance(event, Token)]
            return answer.ids, ids, "".join(event.text for event in events if isinstance(event, Token))

    generated, streamed, text = await asyncio.to_thread(use)
    assert generated == streamed == expected.ids and text == expected.text


async def test_tallystick_generate_streams_text_and_ends_with_json(
    running: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    command = shell(running, "generate", PROMPT, "--model", running.id, "--tokens", "8", "--verify", "full", "--json")
    assert await asyncio.to_thread(main, command) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].startswith(PROMPT)
    told = json.loads(lines[-1])
    assert 0 < told["tokens"] <= 8 and told["verify"] == "full"
    assert len(told["route"]) == 3 and told["checks"]["failed"] == 0 and told["paid_wei"] > 0


async def test_tallystick_network_shows_every_node_with_span_price_and_class(
    running: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    command = shell(running, "network", "--model", running.model.hex(), "--json")
    assert await asyncio.to_thread(main, command) == 0
    told = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    mine = {node.address for node in running.nodes}
    assert told["complete"] and not mine & {node["node"] for node in told["silent"]}
    assert {node["node"] for node in told["nodes"]} == mine
    assert {tuple(node["layers"]) for node in told["nodes"]} == {(s.start, s.end) for s in running.spans}
    assert len({node["class"] for node in told["nodes"]}) == 1, "machines with equal bits are of one class"


async def test_tallystick_models_and_fund_speak_to_the_chain(
    running: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await asyncio.to_thread(main, shell(running, "models")) == 0
    assert "0x" + running.model.hex() in capsys.readouterr().out
    node = running.nodes[0].address
    chain = running.net.chain.chain()
    before = await asyncio.to_thread(chain.funds, running.key.address, node)
    assert await asyncio.to_thread(main, shell(running, "fund", "--node", node, "--amount", "12345")) == 0
    after = await asyncio.to_thread(chain.funds, running.key.address, node)
    assert after.latest - before.latest == 12345
