"""A BART over eight nodes, two for each of its four layers: beams, full verification, nodes that go away."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Running
from harness import task_checkpoints as checkpoints
from harness.watched import Watched
from tallystick import AsyncClient
from tallystick.decoding import Decoder
from tallystick_devnet.localnet import LocalNode
from tallystick_protocol.types import Span

pytestmark = pytest.mark.nightly
SPANS = [Span(first, last) for first, last in pairwise(range(5))]
TEXT = checkpoints.SENTENCES[0]


class Summarizer:
    """The checkpoint, its id, its nodes."""

    def __init__(self, running: Running, folder: Path) -> None:
        self.folder = checkpoints.summarizer(folder)
        self.tokenizer = checkpoints.fast_tokenizer(self.folder)
        model, self.manifest = running.net.publish(self.folder, "tiny summaries")
        self.id = "0x" + model.hex()
        running.net.prepare(2 * len(SPANS))
        self.nodes: list[LocalNode] = [running.net.add_node(model, span) for span in SPANS * 2]
        for node in self.nodes:
            node.wait()

    def kill(self, address: str) -> None:
        next(node for node in self.nodes if node.address == address).process.kill()

    def expected(self, text: str = TEXT, **settings: Any) -> dict[str, str]:
        whole = checkpoints.whole(self.folder, "AutoModelForSeq2SeqLM")
        ids = torch.tensor([self.tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            out = whole.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        return {"summary_text": self.tokenizer.decode(out[0], skip_special_tokens=True)}


@pytest.fixture(scope="module")
def served(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Summarizer:
    return Summarizer(running, tmp_path_factory.mktemp("bart"))


async def test_every_window_of_every_beam_and_of_the_encoder_is_recomputed(
    running: Running, served: Summarizer
) -> None:
    async with AsyncClient(running.key, running.net.settings()) as client:
        found = await client.summarization(TEXT, model=served.id, verify="full")
    assert list(found) == [await asyncio.to_thread(served.expected)], "by the checkpoint's own settings: four beams"
    assert [hop.span for hop in found.route] == SPANS
    verdict = found.verdict
    assert verdict.failed == 0 and verdict.passed == verdict.receipts >= 2 + 4 * 2
    assert {check.node for check in verdict.checks} == {hop.node for hop in found.route}
    assert not {check.auditor for check in verdict.checks} & {check.node for check in verdict.checks}
    assert all(paid > 0 for paid in verdict.paid.values())


async def test_nodes_of_both_stacks_go_away_and_the_summary_is_the_same(running: Running, served: Summarizer) -> None:
    """The encoder's is dead when the text comes, a decoder's dies among its beams; the memory is sent again."""
    async with Watched(running.key, running.net.settings()) as client:
        victims: list[str] = []

        def strike(decoder: Decoder) -> None:
            victims.append(decoder.route[0].node)
            served.kill(decoder.route[0].node)

        client.watch(5, strike)
        record, manifest = await client.model(served.id)
        _, route = await client.planning.route(record, manifest, Span(0, 2))
        served.kill(route[0].node)
        found = await client.summarization(TEXT, model=served.id, verify="off", num_beams=3)
    assert list(found) == [await asyncio.to_thread(served.expected, num_beams=3)]
    lost = {node for node, _, _ in found.verdict.replaced}
    assert victims and set(victims) <= lost
    assert not {route[0].node, *victims} & {hop.node for hop in found.route}
