"""Planning over a thousand nodes, most of them dead: seconds to ask them, and to plan over those that answer.

The client's own code asks and plans: contacts, requests, signed offers, claims. The nodes are sockets on loopback: some
answer after a delay, some accept and say nothing, some refuse. No chain is read: its records are made here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from tallystick.network import Network
from tallystick.routing.candidates import Candidate, Expected
from tallystick.routing.cost import Workload
from tallystick.routing.paths import cheapest
from tallystick.routing.route import choose
from tallystick_protocol.chain.reads import ModelRecord, NodeRecord, Serving
from tallystick_protocol.messages import Offer
from tallystick_protocol.peer import Peers
from tallystick_protocol.signing import Key, keccak, seal, staking_domain
from tallystick_protocol.transport.contact import Addr, Contact
from tallystick_protocol.types import Address, Digest, ModelId, Span, Wei

NODES, LAYERS, ALIVE = 1000, 80, 100
DELAY_S = 0.03
STAKE = Wei(10**21)
ZERO = Digest(bytes(32))
MODEL = ModelRecord(ModelId(keccak(b"model")), ZERO, ZERO, LAYERS)
DOMAIN = staking_domain(31337, Address("0x" + "11" * 20))


@dataclass(slots=True)
class _Chain:
    """What `Network` asks a chain about the nodes of one model."""

    entries: list[Serving] = field(default_factory=list)
    book: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(staking_domain=DOMAIN))

    def serving(self, _: ModelId) -> list[Serving]:
        return list(self.entries)

    def weight(self, _: ModelId) -> Wei:
        return Wei(STAKE * len(self.entries))

    def node_of(self, signer: Address) -> Address:
        return signer

    def locate(self, _: Address) -> Contact | None:
        return None


async def routes(seed: int = 1) -> dict[str, float]:
    """survey1000_s, survey1000_asked, survey1000_again_s, plan1000_s (those that answered), plan1000_alive_s (all)."""
    coins = random.Random(seed)
    work = Workload(LAYERS, prompt=256, new=128, row_bytes=32768)
    peers, found = Peers(), {}
    async with _village(coins) as chain:
        with tempfile.TemporaryDirectory() as cache:
            network = Network(chain, peers, Path(cache), [])  # type: ignore[arg-type]
            began = time.perf_counter()
            answered = (await network.survey(MODEL)).candidates
            found["survey1000_s"] = time.perf_counter() - began
            found["survey1000_answered"] = float(len(answered))
            began = time.perf_counter()
            await network.survey(MODEL, fresh=True)
            found["survey1000_again_s"] = time.perf_counter() - began
            await network.close()
            await peers.close()
    began = time.perf_counter()
    choose(answered, work)
    found["plan1000_s"] = time.perf_counter() - began
    everybody = [_candidate(entry, coins) for entry in chain.entries]
    began = time.perf_counter()
    cheapest(everybody, Span(0, LAYERS), work)
    found["plan1000_alive_s"] = time.perf_counter() - began
    return found


def _offer(node: Address, span: Span) -> Offer:
    expires = int(time.time()) + 3600
    return Offer(node, MODEL.id, ZERO, span.start, span.end, 10**12, 10**18, 4096, 1, expires)


def _candidate(entry: Serving, coins: random.Random) -> Candidate:
    node, expected = entry.record.node, Expected(coins.random() / 100)
    return Candidate(
        _offer(node, entry.span), ZERO, node, node, node, STAKE, "", coins.random() / 10, None, True, expected, expected
    )


@contextlib.asynccontextmanager
async def _village(coins: random.Random) -> AsyncIterator[_Chain]:
    """A chain with nodes that answer, that accept and say nothing, and that are nowhere."""
    chain, servers = _Chain(), []
    silent = await asyncio.start_server(_hang, "127.0.0.1", 0, backlog=1024)
    nowhere = await asyncio.start_server(_hang, "127.0.0.1", 0)
    dead = [server.sockets[0].getsockname()[1] for server in (silent, nowhere)]
    nowhere.close()
    for index in range(NODES):
        key = Key(coins.randbytes(32))
        start = 4 * index % LAYERS
        span = Span(start, min(start + coins.choice((8, 16, 32)), LAYERS))
        port = dead[index % 2]
        if index < ALIVE:
            info = {"offer": seal(DOMAIN, _offer(key.address, span), key).hex(), "status": {"parts": True}}
            servers.append(await asyncio.start_server(_Answer(json.dumps(info).encode()).serve, "127.0.0.1", 0))
            port = servers[-1].sockets[0].getsockname()[1]
        contact = Contact(key.address, (Addr("tcp", "127.0.0.1", port),))
        record = NodeRecord(key.address, STAKE, Wei(0), MODEL.id, span, key.address)
        chain.entries.append(Serving(record, span, key.address, Wei(10**12), contact))
    try:
        yield chain
    finally:
        for server in (silent, *servers):
            server.close()


@dataclass(frozen=True, slots=True)
class _Answer:
    body: bytes

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(DELAY_S)
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(self.body)}\r\nConnection: close\r\n\r\n"
            writer.write(head.encode() + self.body)
            await writer.drain()
        writer.close()


async def _hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()
