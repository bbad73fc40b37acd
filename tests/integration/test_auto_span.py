"""A node that chooses its span by itself joins the running network, and `plan` says what it would choose and why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import Running
from harness.waiting import eventually
from tallystick import AsyncClient
from tallystick_devnet.demo import default_model
from tallystick_devnet.localnet import LocalNet, LocalNode
from tallystick_model.memory import largest_piece_bytes, span_bytes
from tallystick_node.planning.supply import missing
from tallystick_protocol.types import Span


@pytest.fixture(scope="module")
def chooser(running: Running) -> Iterator[LocalNode]:
    """A node with span = auto, whose checks run every second."""
    settings = ["--span", "auto", "--check-class-s", "1", "--look-around-s", "1"]
    node = running.net.add_node(running.model, running.spans[1], settings=settings)
    try:
        node.wait()
        yield node
    finally:
        node.process.stop()
        running.net.nodes.remove(node)


def registered(running: Running, node: LocalNode) -> Span | None:
    return running.net.chain.chain().node(node.address).span


def test_it_registers_a_span_that_fits_the_others(running: Running, chooser: LocalNode) -> None:
    span = registered(running, chooser)
    assert span is not None
    assert missing([*running.spans, span], running.manifest.layers) == 0
    whole = Span(0, running.manifest.layers)
    assert span in running.spans or span == whole or any(one.start <= span.start < one.end for one in running.spans)


async def test_its_log_says_why_how_long_and_that_it_looks_around(running: Running, chooser: LocalNode) -> None:
    def log() -> str:
        return chooser.process.log.read_text()

    assert "bottleneck" in log() or "nobody serves" in log()
    line = next(line for line in log().splitlines() if "start took:" in line)
    for step in ("fetching and hashing", "reading, checking and packing", "canary", "class test"):
        assert step in line
    await eventually("the node to look around", lambda: "has served" in log(), 60)
    assert chooser.process.alive, chooser.process.tail(20)


def plan_command(running: Running, state: Path, *options: str) -> subprocess.CompletedProcess[str]:
    chain = running.net.chain
    command = [
        sys.executable, "-m", "tallystick_node.cli", "plan", "--dry-run", "--json", "--rpc", chain.rpc,
        "--book", str(chain.book), "--model", running.id, "--sources", running.net.source,
        "--hot-key", str(state / "none.json"), "--state", str(state), *options,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=os.environ)


def test_plan_shows_layers_candidates_and_the_choice(running: Running, tmp_path: Path) -> None:
    done = plan_command(running, tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["missing_layers"] == 0 and plan["servers"] >= 7 and plan["throughput"] > 0
    assert len(plan["layers"]) == running.manifest.layers
    assert plan["choice"] == plan["candidates"][0]["span"] or plan["choice"] in {c["span"] for c in plan["candidates"]}
    assert "rows/s" in plan["why"]
    assert not list((tmp_path / "store" / "files").iterdir()), "the manifest alone was fetched"


def test_plan_says_what_a_span_of_the_settings_would_bring(running: Running, tmp_path: Path) -> None:
    done = plan_command(running, tmp_path, "--span", "1:2")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["choice"] == "1:2" and "the settings say so" in plan["why"] and "auto would take" in plan["why"]
    assert "no route passes through it" in plan["why"]
    beyond = plan_command(running, tmp_path, "--span", "1:99")
    assert beyond.returncode == 1 and "has layers [0, 6), not [1, 99)" in beyond.stderr


@pytest.mark.nightly
async def test_a_node_moves_to_layers_that_nobody_serves_and_serves_them(tmp_path: Path) -> None:
    with LocalNet(tmp_path) as net:
        model, manifest = net.publish(default_model())
        front = Span(0, (manifest.layers + 1) // 2)
        back = Span(front.end, manifest.layers)
        room = max(span_bytes(manifest, span) for span in (front, back)) + (1 << 20)
        memory = room + largest_piece_bytes(manifest, manifest.whole) + (1 << 28)
        net.prepare(2)
        settings = ["--cache-bytes", str(1 << 28)]
        auto = ["--span", "auto", "--memory", str(memory), "--look-around-s", "1", "--dwell-s", "0"]
        mover = net.add_node(model, front, settings=[*settings, *auto])
        mover.wait()
        began = net.chain.chain().node(mover.address).span
        assert began in (front, back)
        stayer = net.add_node(model, began, settings=settings)
        stayer.wait()
        there = back if began == front else front
        await eventually(
            "the node to move", lambda: net.chain.chain().node(mover.address).span == there, 90
        )
        await eventually("it to serve", lambda: mover.process.log.read_text().count("start took:") == 2, 60)
        key, _ = net.client_key()
        async with AsyncClient(key, net.settings()) as client:
            answer = await client.generate("The function returns", model="0x" + model.hex(), max_tokens=4)
        assert len(answer.ids) == 4
