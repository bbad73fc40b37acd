"""The zoo's cheaters as processes of a real network: caught by the check named for them, and nobody else accused."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from conftest import Running
from faults.computing import COMPUTING
from tallystick import AsyncClient, Sampling
from tallystick.generation import Answer
from tallystick.verdict import Policy
from tallystick_devnet.localnet import READY_TIMEOUT_S, LocalNode
from zoo.protocol import SCENARIOS

PROGRAM = Path(__file__).parents[1] / "faults" / "cheating_node.py"
PROMPT = "The function returns a list of"
TOKENS = 40
REFUSED = {"zeros": "bad_tensor"}
"""What the next hop refuses at once, because no row has such a norm; all others take an audit."""

ALONE = [name for name, scenario in SCENARIOS.items() if set(scenario.who) == {(1, 0)}]
PROMPTS = ("If the file does not exist,", "This module provides", "A list of all", "Raises an error when the", "def")


@asynccontextmanager
async def bent(running: Running, node: LocalNode, name: str, price: int) -> AsyncIterator[None]:
    """While held, a node of the network cheats, at half its price."""
    await asyncio.to_thread(node.process.stop)
    running.net.restart(node, running.model, (sys.executable, str(PROGRAM), name), ["--price", str(price // 2)])
    try:
        await asyncio.to_thread(node.process.wait_for, f"fault: {name}", READY_TIMEOUT_S)
        await asyncio.to_thread(node.wait)
        yield
    finally:
        await asyncio.to_thread(node.process.stop)
        running.net.restart(node, running.model)
        await asyncio.to_thread(node.wait)


async def ask(running: Running, verify: Policy) -> Answer:
    async with AsyncClient(running.key, running.net.settings()) as client:
        return await client.generate(PROMPT, max_tokens=TOKENS, model=running.id, verify=verify, ignore_eos=True)


async def catch(running: Running, name: str, check: str, verify: Policy) -> None:
    """The hop of the middle span cheats; the answer comes out right, and only it was replaced."""
    honest = await ask(running, "off")
    cheater = running.node(honest.route[1].node)
    async with bent(running, cheater, name, honest.route[1].offer.price):
        answer = await ask(running, verify)
    verdict = answer.verdict
    accused = {accusation.node for accusation in verdict.accusations}
    codes = {code for lost, _, code in verdict.replaced if lost == cheater.address}
    assert check in codes | ({"accused"} if cheater.address in accused else set()), (name, verdict)
    assert accused <= {cheater.address}, "no honest node is accused"
    assert {lost for lost, _, _ in verdict.replaced} == {cheater.address}
    assert answer.ids == honest.ids


async def test_a_node_of_each_kind_is_caught(running: Running) -> None:
    await catch(running, "zeros", "bad_tensor", "off")
    await catch(running, "right_for_audits", "accused", "full")


@pytest.mark.nightly
@pytest.mark.parametrize("name", COMPUTING)
async def test_who_computes_wrongly_is_caught(running: Running, name: str) -> None:
    await catch(running, name, REFUSED.get(name, "accused"), "full")


@pytest.mark.nightly
@pytest.mark.parametrize("name", ALONE)
async def test_who_breaks_the_protocol_is_caught(running: Running, name: str) -> None:
    await catch(running, name, SCENARIOS[name].check, SCENARIOS[name].policy)


async def honest_windows(running: Running, number: int) -> None:
    """So many windows, recomputed by other processes."""
    seen, session = 0, 0
    async with AsyncClient(running.key, running.net.settings()) as client:
        while seen < number:
            answer = await client.generate(
                PROMPTS[session % len(PROMPTS)], max_tokens=30 + 17 * session % 70, model=running.id, verify="full",
                ignore_eos=True, sampling=Sampling(temperature=0.9, seed=session),
                speculate="lookup" if session % 3 == 1 else "off", mode="ring" if session % 3 == 2 else "pipeline",
            )  # fmt: skip
            verdict = answer.verdict
            assert not verdict.accusations and not verdict.failed and not verdict.replaced
            assert set(verdict.spans) == set(running.spans)
            seen, session = seen + verdict.passed, session + 1


async def test_honest_processes_are_not_accused(running: Running) -> None:
    await honest_windows(running, 9)


@pytest.mark.nightly
async def test_honest_processes_are_not_accused_in_three_hundred_windows(running: Running) -> None:
    await honest_windows(running, 300)
