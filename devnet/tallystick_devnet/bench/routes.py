"""Planning over a thousand offers, most of them dead: seconds to ask the nodes, and to plan over those that answer.

The nodes are sockets on loopback: some answer after a delay, some accept and say nothing, some refuse. Only the
figures of one machine; what is asked, and of whom, is the client's own code.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from tallystick.routing.candidates import Candidate, Expected
from tallystick.routing.claims import read_claims
from tallystick.routing.cost import Workload
from tallystick.routing.paths import cheapest
from tallystick.routing.route import choose
from tallystick.routing.survey import Round, well_served
from tallystick_protocol.errors import TallystickError
from tallystick_protocol.messages import Offer
from tallystick_protocol.peer import Peers
from tallystick_protocol.signing import checksum_address, keccak
from tallystick_protocol.types import Address, Digest, Span, Wei

NODES, LAYERS, ALIVE = 1000, 80, 100
DELAY_S = 0.03


@dataclass(frozen=True, slots=True)
class _Node:
    url: str
    span: Span
    rtt_s: float


async def routes(seed: int = 1) -> dict[str, float | None]:
    """survey1000_s, survey1000_asked, plan1000_s (of those that answered), plan1000_alive_s (where all do)."""
    coins = random.Random(seed)
    async with _village() as urls:
        nodes = [
            _Node(
                urls[0] if index < ALIVE else urls[1 + index % 2],
                Span(start := coins.randrange(0, LAYERS, 4), min(start + coins.choice((8, 16, 32)), LAYERS)),
                coins.random() / 10,
            )
            for index in range(NODES)
        ]
        coins.shuffle(nodes)
        peers, asked = Peers(), 0

        async def ask(node: _Node) -> Candidate | None:
            nonlocal asked
            asked += 1
            try:
                info = await peers.info(node.url, 2.0)
            except TallystickError:
                return None
            return _candidate(node, coins, read_claims(info["status"], len(node.span)).delivers)

        began = time.perf_counter()
        surveyed = Round(nodes, ask)
        answers = await surveyed.settle(lambda so_far: well_served([c for c in so_far if c is not None], LAYERS))
        survey_s = time.perf_counter() - began
        await surveyed.close()
        await peers.close()
    work = Workload(LAYERS, prompt=256, new=128, row_bytes=32768)
    began = time.perf_counter()
    choose([c for c in answers if c is not None], work)
    plan_s = time.perf_counter() - began
    everybody = [_candidate(node, coins, Expected(coins.random() / 100)) for node in nodes]
    began = time.perf_counter()
    cheapest(everybody, Span(0, LAYERS), work)
    return {
        "survey1000_s": survey_s,
        "survey1000_asked": asked,
        "plan1000_s": plan_s,
        "plan1000_alive_s": time.perf_counter() - began,
    }


def _candidate(node: _Node, coins: random.Random, expected: Expected) -> Candidate:
    address = checksum_address(keccak(coins.randbytes(8))[12:])
    zero = Digest(bytes(32))
    offer = Offer(address, zero, zero, node.span.start, node.span.end, 10**12, 10**18, 4096, 1, 2**40)
    signer = Address(address)
    return Candidate(
        offer, zero, address, address, signer, Wei(10**21), node.url, node.rtt_s, None, True, expected, expected
    )


@contextlib.asynccontextmanager
async def _village() -> AsyncIterator[list[str]]:
    """URLs of what answers, of what accepts and says nothing, and of nobody."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(DELAY_S)
        body = json.dumps({"status": {"rows_per_s": 100}}).encode()
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    servers = [await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1024) for serve in (answer, hang, hang)]
    urls = [f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in servers]
    servers[2].close()
    try:
        yield urls
    finally:
        for server in servers[:2]:
            server.close()
