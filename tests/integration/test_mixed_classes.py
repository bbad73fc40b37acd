"""Nodes of different numeric classes, as processes whose libraries use different instruction sets."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from tallystick import AsyncClient
from tallystick.generation import Answer
from tallystick.routing.suspicions import Suspicions
from tallystick_devnet.demo import default_model
from tallystick_devnet.localnet import READY_TIMEOUT_S, LocalNet, LocalNode
from tallystick_protocol.signing import Key
from tallystick_protocol.types import ModelId, Span

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="one class only"),
]

FAULTS = Path(__file__).parents[1] / "faults"
PINS = (
    "DNNL_VERBOSE=0",
    "TALLYSTICK_KERNELS=libraries,ATEN_CPU_CAPABILITY=avx2,ONEDNN_MAX_CPU_ISA=AVX2",
    "TALLYSTICK_KERNELS=libraries,MKL_CBWR=COMPATIBLE",
)
"""Three classes of one machine: as it is, as if it had AVX2 only, and with MKL's sums in the order of any CPU."""

PROMPT = "The function returns a list of"
PROMPTS = (
    "If the file does not exist,", "This module provides", "A list of all", "Raises an error when the", "def",
    "Return the number of", "The default value is", "Create a new",
)  # fmt: skip
TOKENS = 40


def command(pins: str, *what: str) -> tuple[str, ...]:
    return (sys.executable, str(FAULTS / "older_cpu.py"), pins, *(what or ("tallystick_node.cli",)))


@dataclass(slots=True)
class Mixed:
    """Two spans, each served by one node of every class; the node of the first class is the cheapest."""

    net: LocalNet
    model: ModelId
    key: Key
    spans: list[Span]
    nodes: list[list[LocalNode]]

    async def answer(self, verify: str, prompt: str = PROMPT, **settings: object) -> Answer:
        async with AsyncClient(self.key, replace(self.net.settings(), **settings)) as client:  # type: ignore[arg-type]
            return await client.generate(
                prompt,
                max_tokens=TOKENS,
                model="0x" + self.model.hex(),
                verify=verify,
                ignore_eos=True,  # type: ignore[arg-type]
            )


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mixed]:
    with LocalNet(tmp_path_factory.mktemp("mixed")) as net:
        model, manifest = net.publish(default_model())
        spans = [Span(0, manifest.layers // 2), Span(manifest.layers // 2, manifest.layers)]
        net.prepare(6)
        nodes = [
            [net.add_node(model, span, command(pins), ["--price", str(10**9 * (1 + number))]) for span in spans]
            for number, pins in enumerate(PINS)
        ]
        key, _ = net.client_key()
        for node in (node for row in nodes for node in row):
            node.wait()
        yield Mixed(net, model, key, spans, nodes)


async def test_honest_nodes_of_other_classes_pass_each_others_audits(mixed: Mixed) -> None:
    answer = await mixed.answer("full")
    verdict = answer.verdict
    assert {check.how for check in verdict.checks} == {"sketch"}, "nobody has a twin"
    assert verdict.failed == 0 and verdict.passed >= 4 and not verdict.accusations and not verdict.replaced
    assert 0 < verdict.worst_error < verdict.tolerance
    assert not any(verdict.withheld.values())
    audited = await mixed.answer("audit", audit_probability=1.0)
    assert audited.verdict.passed and {check.how for check in audited.verdict.checks} == {"sketch"}


async def test_a_cheater_that_no_audit_convicts_is_avoided_after_a_few_sessions(mixed: Mixed) -> None:
    """One corrupted row: too far off to be paid, too near to be guilty, but in a window now and then (errors are about
    four fifths of `guilty`, and sketches say them to 7 %). Each session goes on with the other two nodes of the span,
    which are of two other classes and check each other."""
    cheater, program = mixed.nodes[0][0], str(FAULTS / "cheating_node.py")
    await asyncio.to_thread(cheater.process.stop)
    mixed.net.restart(cheater, mixed.model, command(PINS[0], program, "corrupt_row"), ["--price", "1000000000"])
    await asyncio.to_thread(cheater.process.wait_for, "fault: corrupt_row", READY_TIMEOUT_S)
    await asyncio.to_thread(cheater.wait)
    met, sessions, convicted = True, 0, 0
    while met and sessions < len(PROMPTS):
        answer = await mixed.answer("full", PROMPTS[sessions])
        verdict, sessions = answer.verdict, sessions + 1
        convicted += bool(verdict.accusations)
        assert {one.node for one in verdict.accusations} <= {cheater.address} and len(answer.ids) == TOKENS
        assert {check.node for check in verdict.checks if check.passed is not True} <= {cheater.address}
        assert verdict.paid.get(cheater.address, 0) == 0 and cheater.address not in {hop.node for hop in answer.route}
        met = cheater.address in {lost for lost, _, _ in verdict.replaced}
    assert not met and 1 < sessions <= 7 and convicted < sessions - 1, "a few windows with each of two auditors"
    remembered = Suspicions(mixed.net.settings().cache / "suspicions.json")
    assert remembered.avoided(mixed.model) == {cheater.address}
