"""Nodes that hang, stand still, stop or are killed in a prompt, links that are cut, the last node of a span lost: on
real processes.

The network is the shared one; the model has nodes of its own, behind proxies whose connections can be cut. It is a
`bf16w` one: with test_network.py, failover is tested in both numerics.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from conftest import Running
from harness.waiting import eventually
from tallystick import AsyncClient, Sampling, Token
from tallystick.generation import Answer, Stream
from tallystick.session import stakes
from tallystick.session.watch import STEP_LIMIT_S
from tallystick.verdict import Policy
from tallystick_devnet.demo import default_model
from tallystick_devnet.faults import Faults, Victim
from tallystick_devnet.leaks import Holdings, holdings, leaks
from tallystick_devnet.localnet import PASSWORD, thirds
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.errors import NoRoute
from tallystick_protocol.keystore import open_keystore
from tallystick_protocol.types import Span, Wei

PROMPT = "The function returns a list of"
TOKENS, LONG = 40, 440
LONG_PROMPT = [5 + 7 * i % 4000 for i in range(400)]
SLACK_S = 1.0
"""More than the longest step of an answer during which nothing happens: the machine does other things, too."""

STANDING = (sys.executable, str(Path(__file__).parents[1] / "faults" / "standing_node.py"))
SEEDED = Sampling(temperature=0.9, top_p=0.95, seed=7)


@dataclass(slots=True)
class Broken:
    """Five nodes: two for the first and the middle span, one for the last. truth: what is said when nothing breaks."""

    running: Running
    faults: Faults
    model: str
    spans: list[Span]
    first: dict[int, Holdings]
    waited: list[str]
    truth: dict[float, list[int]]

    def client(self, wait_s: float = 120.0) -> AsyncClient:
        settings = self.running.net.settings()  # nobody can audit the one node of the last span
        settings = replace(settings, wait_s=wait_s, notify=self.waited.append, audit_probability=0.0)
        return AsyncClient(self.running.key, settings)

    def at(self, stream: Stream, hop: int) -> Victim:
        return self.faults.of(stream.session_route[hop].node)

    async def ask(
        self, act: Callable[[Stream], Any] | None = None, after: int = 9, *, verify: Policy = "off",
        sampling: Sampling | None = None, wait_s: float = 120.0, tokens: int = TOKENS,
    ) -> tuple[Answer, Stream, float]:  # fmt: skip
        """An answer; `act` is called in a thread after so many tokens. And the longest time between two tokens."""
        async with self.client(wait_s) as client:
            stream = client.stream(
                PROMPT, max_tokens=tokens, model=self.model, verify=verify, ignore_eos=True,
                sampling=sampling or Sampling(),
            )  # fmt: skip
            count, last, gap = 0, 0.0, 0.0
            async for event in stream:
                now = time.monotonic()
                gap, last = max(gap, now - last) if count else gap, now
                count += isinstance(event, Token)
                if count == after and act is not None:
                    await asyncio.to_thread(act, stream)
                    act = None
            return stream.answer, stream, gap

    async def left(self) -> list[str]:
        nodes = [
            (victim.node, victim.port, self.first[victim.node.process.pid])
            for victim in self.faults.victims
            if victim.node.process.pid in self.first
        ]
        return await asyncio.to_thread(leaks, nodes, 15.0)


@pytest.fixture(scope="module")
def faults(running: Running) -> Iterator[tuple[Faults, str]]:
    model, manifest = running.net.publish(default_model(), numerics="bf16w")
    with Faults(running.net, model) as faults:
        running.net.prepare(5)
        first, middle, last = thirds(manifest.layers)
        for span in (first, middle, last, first, middle):
            faults.add(span, command=STANDING)
        for victim in faults.victims:
            victim.node.wait()
        yield faults, "0x" + model.hex()
        faults.stop()


@pytest.fixture(scope="module")
async def broken(running: Running, faults: tuple[Faults, str]) -> AsyncIterator[Broken]:
    found = Broken(running, faults[0], faults[1], running.spans, {}, [], {})
    for sampling in (Sampling(), SEEDED):
        found.truth[sampling.temperature] = (await found.ask(sampling=sampling))[0].ids
    for victim in faults[0].victims:
        found.first[victim.node.process.pid] = await asyncio.to_thread(holdings, victim.node, victim.port)
    yield found


def rows_of(answer: Answer) -> int:
    return len(answer.prompt_ids) + TOKENS - 1


async def test_links_that_are_cut_are_mended_and_nothing_is_computed_again(broken: Broken) -> None:
    """Client's and push connections, at three moments; what each node was paid is what it is paid undisturbed."""
    for hop, after in ((0, 3), (1, 12), (2, 20)):
        answer, stream, _ = await broken.ask(lambda stream, hop=hop: broken.at(stream, hop).link.cut(), after)
        assert answer.ids == broken.truth[0.0] and not answer.verdict.replaced
        for candidate in stream.session_route:
            units = candidate.span.units(6)
            assert answer.verdict.paid[candidate.node] == rows_of(answer) * units * candidate.offer.price
    assert not await broken.left()


async def test_a_hop_that_hangs_is_replaced_and_forgotten(broken: Broken) -> None:
    hung: list[Victim] = []

    def hang(stream: Stream) -> None:
        hung.append(broken.at(stream, 1))
        hung[0].node.process.hang()

    answer, _, gap = await broken.ask(hang, sampling=SEEDED)
    hung[0].node.process.go_on()
    print(f"\na hop that hung: the longest time between two tokens was {gap:.2f} s")
    assert gap < 8, "noticed by how long its own answers took, not by a fixed 10 s"
    assert answer.ids == broken.truth[0.9]
    assert [lost for lost, _, _ in answer.verdict.replaced] == [hung[0].node.address]
    assert not await broken.left()


@pytest.mark.nightly
async def test_a_hop_that_stands_still_is_replaced_though_it_answers(broken: Broken) -> None:
    """Its device computes nothing any more; it answers PING as ever."""
    late: list[Victim] = []

    def stand(stream: Stream) -> None:
        late.append(broken.at(stream, 1))
        os.kill(late[0].node.process.pid, signal.SIGUSR1)

    answer, _, gap = await broken.ask(stand, after=12)
    assert "fault: the device stands" in late[0].node.process.log.read_text("utf-8", "replace")
    os.kill(late[0].node.process.pid, signal.SIGUSR2)
    print(f"\na hop that stood still: the longest time between two tokens was {gap:.2f} s")
    assert answer.ids == broken.truth[0.0] and gap < STEP_LIMIT_S
    assert [lost for lost, _, _ in answer.verdict.replaced] == [late[0].node.address]
    assert not await broken.left()


def num_computed(victim: Victim) -> int:
    """Rows that a node has computed, whosever they were."""
    with urllib.request.urlopen(f"http://127.0.0.1:{victim.port}/metrics", timeout=10) as response:
        lines: list[str] = response.read().decode().splitlines()
    return next(int(float(line.split()[1])) for line in lines if line.startswith("tallystick_iteration_tokens_total "))


async def long_answer(broken: Broken, kill: Callable[[Stream, list[int]], None] | None = None) -> Answer:
    """An answer to the long prompt; `kill` runs beside it, in a thread, with the tokens that are there."""
    tokens: list[int] = []
    async with broken.client() as client:
        stream = client.stream(LONG_PROMPT, max_tokens=8, model=broken.model, verify="off", ignore_eos=True)
        killing = asyncio.create_task(asyncio.to_thread(kill or (lambda *_: None), stream, tokens))
        async for event in stream:
            tokens += [event.id] if isinstance(event, Token) else []
        await killing
        return stream.answer


@pytest.mark.parametrize("hop", [1, *(pytest.param(hop, marks=pytest.mark.nightly) for hop in (0, 2))])
async def test_a_hop_is_killed_while_a_long_prompt_is_on_its_way(broken: Broken, hop: int) -> None:
    """The last hop's link is slow, so that there is time for it; nobody else serves its layers: it is started again."""
    quiet = await long_answer(broken)
    before = {victim.node.address: num_computed(victim) for victim in broken.faults.victims}
    last = next(victim for victim in broken.faults.victims if victim.node.span == broken.spans[-1])
    killed: list[tuple[str, int]] = []

    def kill(stream: Stream, tokens: list[int]) -> None:
        deadline = time.monotonic() + 60
        while not stream.session_route:
            assert time.monotonic() < deadline, "the session never opened"
            time.sleep(0.01)
        victim = broken.at(stream, hop)
        while num_computed(victim) == before[victim.node.address]:
            assert time.monotonic() < deadline, f"hop {hop} never began"
        victim.node.process.kill()
        killed.append((victim.node.address, len(tokens)))
        last.link.slow(0.0)
        if hop == 2:
            broken.faults.restart(victim)

    last.link.slow(0.15)
    answer = await long_answer(broken, kill)
    ((address, num_tokens),) = killed
    assert num_tokens == 0, "it was killed before the first token"
    assert answer.ids == quiet.ids
    assert address in [lost for lost, _, _ in answer.verdict.replaced]
    await asyncio.to_thread(broken.faults.revive)


@pytest.mark.nightly
async def test_two_hops_are_lost_at_once(broken: Broken) -> None:
    def kill(stream: Stream) -> None:
        for hop in (0, 1):
            broken.at(stream, hop).node.process.kill()

    answer, _, gap = await broken.ask(kill, after=15)
    print(f"\ntwo hops killed: the longest time between two tokens was {gap:.2f} s")
    assert answer.ids == broken.truth[0.0] and len(answer.verdict.replaced) == 2
    await asyncio.to_thread(broken.faults.revive)


@pytest.mark.nightly
async def test_a_node_whose_stake_leaves_is_left_between_two_tokens(
    broken: Broken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on serving; the client sees it on chain, and does not use it in the next session either."""
    monkeypatch.setattr(stakes, "STAKES_S", 0.5)
    chain = broken.running.net.chain
    left: list[tuple[str, Wallet, Wei]] = []

    def unbond(stream: Stream) -> None:
        victim = broken.at(stream, 1)
        wallet = Wallet(chain.chain(), open_keystore(victim.node.folder / "cold.json", PASSWORD))
        stake = chain.chain().node(wallet.address).active
        wallet.send("leaving", wallet.chain.staking.functions.unbond(stake))
        left.append((victim.node.address, wallet, stake))

    answer, _, _ = await broken.ask(unbond, tokens=LONG, sampling=SEEDED)
    ((address, wallet, stake),) = left
    assert answer.ids[:TOKENS] == broken.truth[0.9]
    assert [(lost, why) for lost, _, why in answer.verdict.replaced] == [(address, "unstaked")]
    answer, stream, _ = await broken.ask()
    assert address not in {candidate.node for candidate in stream.session_route}
    await asyncio.to_thread(chain.give, wallet.address, tokens=stake)
    await asyncio.to_thread(wallet.stake, wallet.address, stake)
    assert not await broken.left()


async def test_a_node_that_stops_is_left_between_two_tokens(broken: Broken) -> None:
    """SIGTERM: another node has the rows before they change places, the session goes on, and the process ends."""
    stopped: list[Victim] = []

    def stop(stream: Stream) -> None:
        stopped.append(broken.at(stream, 1))
        stopped[0].node.process.ask_to_stop()

    quiet, _, usual = await broken.ask(tokens=LONG)
    answer, _, gap = await broken.ask(stop, after=5, tokens=LONG)
    print(f"\na hop that stopped: the longest time between two tokens was {gap:.2f} s, {usual:.2f} s when none did")
    assert answer.ids == quiet.ids and gap <= usual + SLACK_S
    assert [(lost, why) for lost, _, why in answer.verdict.replaced] == [(stopped[0].node.address, "draining")]
    await eventually("the process to end", lambda: not stopped[0].node.process.alive, 14.0)
    await asyncio.to_thread(broken.faults.revive)


@pytest.mark.nightly
async def test_the_last_node_of_a_span_is_waited_for_and_missed_with_a_command(broken: Broken) -> None:
    returning: list[asyncio.Future[None]] = []
    loop = asyncio.get_running_loop()

    def kill(stream: Stream) -> None:
        victim = broken.at(stream, 2)
        victim.node.process.kill()
        coming = asyncio.to_thread(broken.faults.restart, victim)
        returning.append(asyncio.run_coroutine_threadsafe(coming, loop))  # type: ignore[arg-type]

    broken.waited.clear()
    answer, _, _ = await broken.ask(kill)
    assert answer.ids == broken.truth[0.0]
    (notice,) = broken.waited
    assert "layers [4, 6)" in notice and "tallystick-node run --join --span 4:6" in notice
    await asyncio.wrap_future(returning[0])  # type: ignore[arg-type]

    with pytest.raises(NoRoute, match="--span 4:6"):
        await broken.ask(lambda stream: broken.at(stream, 2).node.process.kill(), wait_s=0.5)
    await asyncio.to_thread(broken.faults.revive)


@pytest.mark.nightly
async def test_every_hop_may_be_lost_at_every_step(broken: Broken) -> None:
    for verify in ("off", "audit"):
        for sampling in (Sampling(), SEEDED):
            for step in (1, 2, 22, 38, 40):
                for hop in (0, 1):
                    kill = lambda stream, hop=hop: broken.at(stream, hop).node.process.kill()  # noqa: E731
                    answer, _, _ = await broken.ask(kill, step, verify=verify, sampling=sampling)  # type: ignore[arg-type]
                    assert answer.ids == broken.truth[sampling.temperature], f"{verify}, hop {hop}, step {step}"
                    await asyncio.to_thread(broken.faults.revive)
