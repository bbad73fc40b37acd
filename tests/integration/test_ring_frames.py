"""The ring's frames against a first and a last node: who may send ids round, which are taken, what is signed."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from conftest import Running
from harness.raw_session import Attacker, Connection, Identity, Target, ids
from tallystick_devnet.localchain import rich_key
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.frames import DType, Frame, Kind, rows_frame
from tallystick_protocol.receipts import pack_flags, rows_root
from tallystick_protocol.signing import Key
from tallystick_protocol.types import Wei

FUNDS = 10**18
SETTINGS: dict[str, Any] = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "seed": 9, "min_p": 0.0}


@dataclass
class World:
    attacker: Attacker
    first: Target
    last: Target
    hop: Identity
    stranger: Identity


@pytest.fixture(scope="module")
async def world(running: Running) -> AsyncIterator[World]:
    attacker = Attacker(running.net.chain.chain(), Key(secrets.token_bytes(32)), running.manifest.layers)

    def prepare() -> list[Identity]:
        wallet, chain = Wallet(attacker.chain, rich_key()), attacker.chain
        deposits = [(running.nodes[at].address, FUNDS) for at in (0, 2)]
        wallet.send("approving", chain.token.functions.approve(chain.escrow.address, 2 * FUNDS))
        wallet.send("funding", chain.escrow.functions.fund(attacker.key.address, deposits))
        colds = [Key(secrets.token_bytes(32)) for _ in range(2)]
        running.net.chain.give(*(cold.address for cold in colds), tokens=Wei(0))
        return [attacker.bind(cold, Key(secrets.token_bytes(32))) for cold in colds]

    hop, stranger = await asyncio.to_thread(prepare)
    first, last = [await attacker.target(running.nodes[at].url) for at in (0, 2)]
    yield World(attacker, first, last, hop, stranger)
    await attacker.close()


def step(tokens: list[int], position: int, **body: Any) -> Frame:
    return rows_frame(Kind.STEP, DType.IDS, ids(*tokens), position, {"want": pack_flags([True] * len(tokens)), **body})


async def position(connection: Connection) -> int:
    await connection.send(Frame(Kind.PING))
    return int((await connection.next(Kind.PONG)).body["at"])


async def reaches(connection: Connection, length: int) -> None:
    while await position(connection) < length:
        await asyncio.sleep(0.01)


async def test_the_first_hop_takes_the_next_id_and_signs_what_its_client_confirms(world: World) -> None:
    attacker, tokens = world.attacker, list(range(5, 37))
    async with attacker.open(world.first, max_length=64, next=world.hop.address) as session:
        assert await session.command(Kind.RING, {"from": world.hop.address, "until": 31}) is None
        await session.step(ids(*tokens[:28]))
        await reaches(session, 28)
        async with attacker.push(world.first, session, world.stranger) as other:
            assert (await other.error())["code"] == "unauthorized"
        async with attacker.push(world.first, session, world.hop) as ring:
            await ring.next(Kind.PUSH_OPENED)
            for bad in (step([1, 2], 28), step([1], 29), step([9], 3)):  # two rows, not the next one, an old one
                await ring.send(bad)
            for at, token in enumerate([*tokens[28:], 1], 28):  # beyond `until` they are ignored
                await ring.send(step([token], at))
            await reaches(session, 31)
            await session.send(step([tokens[28]], 28, confirm=True))
            await session.send(step(tokens[31:], 31))
            await reaches(session, 32)
            await session.send(Frame(Kind.FLUSH, position=32))
            assert await position(session) == 32
            assert not [frame for frame in session.frames if frame.kind is Kind.RECEIPT], "29 and 30 are not confirmed"
            await session.send(step(tokens[29:32], 29, confirm=True))
            receipt, _ = attacker.receipt(await session.next(Kind.RECEIPT))
            assert (receipt.first, receipt.last) == (0, 32) and receipt.input == rows_root(ids(*tokens))
            told = [frame.body["code"] for frame in session.frames if frame.kind is Kind.ERROR]
            assert set(told) <= {"unreachable"}, "of the next hop, which is nobody"


async def test_the_first_hop_tells_of_an_id_that_was_made_up_and_signs_nothing_of_it(world: World) -> None:
    attacker = world.attacker
    async with attacker.open(world.first, max_length=64, next=world.hop.address) as session:
        await session.command(Kind.RING, {"from": world.hop.address, "until": 64})
        await session.step(ids(*range(5, 36)))
        await reaches(session, 31)
        async with attacker.push(world.first, session, world.hop) as ring:
            await ring.next(Kind.PUSH_OPENED)
            await ring.send(step([7], 31))
            await reaches(session, 32)
            await session.send(step([8], 31, confirm=True))
            error = await session.error()
            while error.get("hop") != world.hop.address:  # the next hop of this session is nobody that answers
                error = await session.error()
            assert error["code"] in ("link_mismatch", "unreachable")
            while error["code"] != "link_mismatch":
                error = await session.error()
            assert error["wrong_from"] == 31
            assert not [frame for frame in session.frames if frame.kind is Kind.RECEIPT]
            assert await session.command(Kind.CROP, {"epoch": 1}, 31) is None
            await session.send(step([8], 31))
            receipt, _ = attacker.receipt(await session.next(Kind.RECEIPT))
            assert receipt.input == rows_root(ids(*range(5, 36), 8))


async def test_a_ring_is_refused_where_it_cannot_be_and_with_settings_that_mean_nothing(world: World) -> None:
    attacker = world.attacker
    body = {"first": world.hop.address, "until": 9, "sampling": SETTINGS, "ends": [3]}
    async with attacker.open(world.first, max_length=16) as session:
        assert await session.command(Kind.RING, {"from": world.hop.address, "until": 9}) is None
        refused = await session.command(Kind.RING, body)
        assert refused is not None and refused["code"] == "bad_frame", "it is not the last hop"
    async with attacker.open(world.last, max_length=16, previous=world.hop.address) as session:
        refused = await session.command(Kind.RING, {"from": world.hop.address, "until": 9})
        assert refused is not None and refused["code"] == "bad_frame", "it is not the first hop"
        for name, value in {
            "sampling": {**SETTINGS, "temperature": float("nan")}, "ends": [1] * 257, "until": "9", "first": "nobody",
        }.items():  # fmt: skip
            refused = await session.command(Kind.RING, {**body, name: value})
            assert refused is not None and refused["code"] in ("bad_frame", "bad_message"), name
        for name in SETTINGS:
            left = {key: value for key, value in SETTINGS.items() if key != name}
            refused = await session.command(Kind.RING, {**body, "sampling": left})
            assert refused is not None and refused["code"] == "bad_frame", name
        assert await session.command(Kind.RING, body) is None
        assert await position(session) == 0
    async with attacker.open(world.last, max_length=16, top_k=0, previous=world.hop.address) as session:
        refused = await session.command(Kind.RING, body)
        assert refused is not None and refused["code"] == "bad_frame", "dense rows are not chosen from"
