"""A node that deals its span out to two processes, run for real: answers through it, and its processes' ends."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import Running
from harness import checkpoints
from harness.waiting import eventually
from tallystick import AsyncClient, Token
from tallystick_devnet.localnet import LocalNode
from tallystick_protocol.errors import NoRoute
from tallystick_protocol.types import ModelId, Span

STOCK = ["--execution", "stock"]
PROMPT = [1, *range(20, 40)]


@dataclass(slots=True)
class Dealt:
    running: Running
    model: str
    checkpoint: Path
    span: Span
    ranked: LocalNode
    spare: LocalNode

    def client(self, *, admit_stock: bool = True) -> AsyncClient:
        return AsyncClient(self.running.key, replace(self.running.net.settings(), admit_stock=admit_stock))


def followers(node: LocalNode) -> list[int]:
    """The processes that a node's process has started."""
    children = Path(f"/proc/{node.process.pid}/task").glob("*/children")
    return [int(pid) for path in children for pid in path.read_text().split()]


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.fixture(scope="module")
def dealt(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dealt]:
    """A node of two ranks for a whole small model, and a dearer one that runs transformers' kernels in one process."""
    checkpoint = checkpoints.llama(tmp_path_factory.mktemp("dealt") / "checkpoint")
    model, manifest = running.net.publish(checkpoint)
    running.net.prepare(2)
    ranked = running.net.add_node(model, manifest.whole, settings=[*STOCK, "--tensor-parallel", "2"])
    spare = running.net.add_node(model, manifest.whole, settings=[*STOCK, "--price", str(10**13)])
    for node in (ranked, spare):
        node.wait()
    yield Dealt(running, "0x" + model.hex(), checkpoint, manifest.whole, ranked, spare)
    for node in (ranked, spare):
        node.process.stop()


async def test_it_is_used_only_where_that_is_admitted_and_nothing_is_to_be_checked(dealt: Dealt) -> None:
    async with dealt.client(admit_stock=False) as client:
        with pytest.raises(NoRoute, match=r"no numeric class.*set admit_stock"):
            await client.generate(PROMPT, model=dealt.model, max_tokens=2, verify="off")  # type: ignore[arg-type]
    async with dealt.client() as client:
        with pytest.raises(NoRoute, match='verify="audit" cannot check them: set verify="off"'):
            await client.run(dealt.model, PROMPT)


async def test_answers_through_it_are_close_to_transformers_own(dealt: Dealt) -> None:
    whole = await asyncio.to_thread(checkpoints.reference, dealt.checkpoint, "LlamaForCausalLM")
    with torch.inference_mode():
        expected = whole(torch.tensor([PROMPT])).logits[0].numpy()
    async with dealt.client() as client:
        done = await client.run(dealt.model, PROMPT, verify="off")
    assert [hop.node for hop in done.route] == [dealt.ranked.address]
    assert np.abs(done.rows - expected).max() <= 1e-4 * expected.std()
    verdict = done.verdict
    assert verdict.unverifiable == [(dealt.ranked.address, dealt.span)] and verdict.exact
    assert verdict.receipts == 1 and not verdict.checks and verdict.paid[dealt.ranked.address] > 0


async def test_a_rank_that_dies_ends_the_node_and_the_answer_goes_on_elsewhere(dealt: Dealt) -> None:
    (rank,) = followers(dealt.ranked)
    async with dealt.client() as client:
        stream = client.stream(PROMPT, model=dealt.model, max_tokens=24, verify="off", ignore_eos=True)
        shown: list[int] = []
        retracted = 0
        async for event in stream:
            if isinstance(event, Token):
                shown.append(event.id)
            else:
                retracted += event.num_tokens
                del shown[-event.num_tokens :]
            if len(shown) == 5 and not retracted:
                os.kill(rank, signal.SIGKILL)
        answer = stream.answer
    assert retracted >= 5 and shown == answer.ids
    assert len(answer.ids) == 24
    assert [(lost, by) for lost, by, _ in answer.verdict.replaced] == [(dealt.ranked.address, dealt.spare.address)]
    assert not answer.verdict.exact, "the other node's rows are near, not equal"
    await eventually("the node to end", lambda: not dealt.ranked.process.alive, 60)
    assert "a tensor-parallel rank of this node has ended" in dealt.ranked.process.tail(4)


@pytest.mark.nightly
@pytest.mark.parametrize("end", ["stop", "kill"])
async def test_its_processes_end_with_it(dealt: Dealt, end: str) -> None:
    ranked = dealt.ranked
    if not ranked.process.alive:
        model = ModelId(bytes.fromhex(dealt.model[2:]))
        await asyncio.to_thread(dealt.running.net.restart, ranked, model, settings=[*STOCK, "--tensor-parallel", "2"])
        await asyncio.to_thread(ranked.wait)
    (rank,) = followers(ranked)
    await asyncio.to_thread(getattr(ranked.process, end))
    assert "has ended" not in ranked.process.tail(3)
    await eventually("the rank to end", lambda: is_gone(rank), 30)
