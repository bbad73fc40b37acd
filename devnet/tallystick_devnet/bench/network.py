"""The network that is measured: nodes on loopback behind delayable links, and a client that asks them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from tallystick.client import AsyncClient
from tallystick.generation import Answer, Token
from tallystick_devnet.bench.wires import Wires
from tallystick_devnet.localnet import LocalNet, LocalNode
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.signing import Key
from tallystick_protocol.types import Address, ModelId, Span

SAMPLED_NODE = (sys.executable, "-m", "tallystick_devnet.bench.sampled_node")


@dataclass(slots=True)
class Timed:
    """One generation, timed at the client. first_s: from the request to the first token, the opening included."""

    ids: list[int]
    answer: Answer
    first_s: float
    rest_s: float
    worst_gap_s: float
    gaps_s: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens per second after the first."""
        return (len(self.ids) - 1) / self.rest_s


@dataclass(slots=True)
class BenchNet:
    """Nodes that split one model into equal spans, and a client's key."""

    net: LocalNet
    wires: Wires
    model: ModelId
    manifest: Manifest
    key: Key
    nodes: list[LocalNode]
    settings: list[list[str]]

    @property
    def id(self) -> str:
        return "0x" + self.model.hex()

    def client(self, only: Sequence[LocalNode]) -> AsyncClient:
        """A client that uses these nodes and no others."""
        settings = replace(self.net.settings(), audit_probability=0.0)
        client = AsyncClient(self.key, settings)
        client.banned |= {node.address for node in self.nodes} - {node.address for node in only}
        return client

    def cover(self, count: int) -> list[LocalNode]:
        """The nodes that split the model into so many spans, first layers first."""
        wanted = equal_spans(self.manifest.layers, count)
        found: dict[Span, LocalNode] = {}
        for node in self.nodes:
            if node.span in wanted and node.process.alive:
                found.setdefault(node.span, node)
        return [found[span] for span in wanted]

    def copies(self, count: int) -> list[LocalNode]:
        """Every node that serves one of so many spans."""
        return [node for node in self.nodes if node.span in equal_spans(self.manifest.layers, count)]

    def by_address(self, address: Address) -> LocalNode:
        return next(node for node in self.nodes if node.address == address)

    def revive(self, node: LocalNode) -> None:
        """Start a killed node again, at the same port."""
        at = self.nodes.index(node)
        self.net.restart(node, self.model, SAMPLED_NODE, self.settings[at])
        node.wait()

    def samples(self, node: LocalNode) -> dict[str, float]:
        """Where a node's threads were since the last call, as shares; the first call begins."""
        path = node.folder / "samples.json"
        path.unlink(missing_ok=True)
        os.kill(node.process.pid, signal.SIGUSR1)
        while not path.exists():
            time.sleep(0.01)
        counts: dict[str, int] = json.loads(path.read_text())
        total = sum(counts.values()) or 1
        return {kind: round(count / total, 4) for kind, count in sorted(counts.items())}


@contextmanager
def bench_net(folder: Path, checkpoint: Path, spans: Sequence[Span], threads: int, numerics: Any) -> Iterator[BenchNet]:
    """Start nodes for these spans."""
    with LocalNet(folder) as net:
        ports = _free_ports(len(spans))
        model, manifest = net.publish(checkpoint, numerics=numerics)
        with Wires(ports) as wires:
            net.prepare(len(spans))
            nodes, given = [], []
            for span, port in zip(spans, ports, strict=True):
                settings = [
                    "--port", str(port), "--announce", f"127.0.0.1:{wires.ports[port]}", "--threads", str(threads),
                    "--max-length", str(min(manifest.max_length, 8192)),
                ]  # fmt: skip
                nodes.append(net.add_node(model, span, SAMPLED_NODE, settings))
                given.append(settings)
            key, _ = net.client_key()
            for node in nodes:
                node.wait()
            yield BenchNet(net, wires, model, manifest, key, nodes, given)


def equal_spans(layers: int, count: int) -> list[Span]:
    """The layers in so many parts of nearly equal size."""
    edges = [round(layers * part / count) for part in range(count + 1)]
    return [Span(start, end) for start, end in pairwise(edges)]


async def timed(client: AsyncClient, net: BenchNet, prompt: list[int], tokens: int, **options: Any) -> Timed:
    """One generation; options as for `AsyncClient.stream`."""
    began = time.perf_counter()
    stream = client.stream(prompt, model=net.id, max_tokens=tokens, ignore_eos=True, **options)
    times = []
    async for event in stream:
        if isinstance(event, Token):
            times.append(time.perf_counter())
    gaps = [late - early for early, late in pairwise(times)]
    answer = stream.answer
    return Timed(answer.ids, answer, times[0] - began, times[-1] - times[0], max(gaps, default=0.0), gaps)


async def together(client: AsyncClient, net: BenchNet, prompts: Sequence[list[int]], tokens: int) -> float:
    """Tokens per second of several generations side by side, from the first token of the last to begin on."""
    firsts: list[float] = []
    counts: list[float] = []

    async def one(prompt: list[int]) -> None:
        stream = client.stream(prompt, model=net.id, max_tokens=tokens, ignore_eos=True, verify="off")
        count = 0
        async for event in stream:
            if isinstance(event, Token):
                count += 1
                counts.append(time.perf_counter())
                if count == 1:
                    firsts.append(counts[-1])

    await asyncio.gather(*(one(prompt) for prompt in prompts))
    begin = max(firsts)
    inside = [at for at in counts if at > begin]
    return len(inside) / (inside[-1] - begin) if len(inside) > 1 else 0.0


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for sock in sockets:
        sock.bind(("127.0.0.1", 0))
    ports = [int(sock.getsockname()[1]) for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports
