"""A node's side of a lost connection: the lease, who may come back, and what is sent again."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from conftest import Running
from harness.raw_session import Attacker, Connection, RawSession, Target, ids
from tallystick_devnet.localchain import rich_key
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.frames import Frame, Kind
from tallystick_protocol.messages import Resume
from tallystick_protocol.signing import Key, seal
from tallystick_protocol.types import ZERO32

FUNDS = 10**18


@pytest.fixture(scope="module")
async def attacker(running: Running) -> AsyncIterator[Attacker]:
    found = Attacker(running.net.chain.chain(), Key(secrets.token_bytes(32)), running.manifest.layers)

    def fund() -> None:
        wallet, chain = Wallet(found.chain, rich_key()), found.chain
        deposits = [(running.nodes[at].address, FUNDS) for at in (0, 2)]
        wallet.send("approving", chain.token.functions.approve(chain.escrow.address, 2 * FUNDS))
        wallet.send("funding", chain.escrow.functions.fund(found.key.address, deposits))

    await asyncio.to_thread(fund)
    yield found
    await found.close()


@pytest.fixture(scope="module")
async def first(running: Running, attacker: Attacker) -> Target:
    return await attacker.target(running.nodes[0].url)


def claim(attacker: Attacker, of: RawSession, number: int, signer: Key | None = None, **changes: Any) -> Frame:
    """A RESUME of someone who has nothing yet."""
    assert of.target is not None
    values = {"node": of.target.node, "session": of.id, "number": number, "spki": ZERO32,
              "issued": int(time.time())}  # fmt: skip
    sealed = seal(attacker.domain, Resume(**{**values, **changes}), signer or attacker.key)
    return Frame(Kind.RESUME, {"resume": sealed, "receipts": 0, "results": 0})


@asynccontextmanager
async def back(attacker: Attacker, session: RawSession, number: int) -> AsyncIterator[Connection]:
    """The session over another connection."""
    assert session.target is not None
    async with attacker.connect(session.target) as connection:
        await connection.send(claim(attacker, session, number))
        yield connection


async def position(connection: Connection) -> int:
    await connection.send(Frame(Kind.PING))
    return int((await connection.next(Kind.PONG)).body["at"])


async def reaches(connection: Connection, length: int) -> None:
    while await position(connection) < length:
        await asyncio.sleep(0.01)


async def test_a_session_goes_on_over_another_connection_with_its_receipts(attacker: Attacker, first: Target) -> None:
    async with attacker.open(first, max_length=256) as session:
        assert session.opened.body["lease_s"] > 0
        await session.step(ids(*range(40)))
        await reaches(session, 40)
        (signed,) = [attacker.receipt(await session.next(Kind.RECEIPT))[0]]
        session.abort()
        async with back(attacker, session, 1) as again:
            state = await again.next(Kind.RESUMED)
            assert state.body == {"position": 40, "epoch": 0}
            assert attacker.receipt(await again.next(Kind.RECEIPT))[0] == signed, "it signed nothing anew"
            whole = RawSession(again.channel, again.frames, target=first, id=session.id)
            await whole.step(ids(*range(40, 64)), 40)
            await reaches(again, 64)
            second, _ = attacker.receipt(await again.next(Kind.RECEIPT))
            assert (second.first, second.last, second.revision) == (32, 64, signed.revision)
            assert await again.command(Kind.CLOSE) is None


async def test_rows_that_were_sent_twice_are_charged_once(attacker: Attacker, first: Target) -> None:
    before, _ = await attacker.owed(first)
    async with attacker.open(first, max_length=64) as session:
        await session.step(ids(*range(8)))
        await reaches(session, 8)
        session.abort()
        async with back(attacker, session, 1) as again:
            await again.next(Kind.RESUMED)
            await RawSession(again.channel, again.frames, target=first).step(ids(*range(8)), 0)
            assert await position(again) == 8
            await again.command(Kind.CLOSE)
    after, _ = await attacker.owed(first)
    one = first.offer.price * first.offer.span.units(attacker._num_layers)
    assert after - before == 8 * one


async def test_a_command_is_done_once_and_its_end_is_told_again(attacker: Attacker, first: Target) -> None:
    async with attacker.open(first, max_length=64) as session:
        await session.step(ids(*range(8)))
        await reaches(session, 8)
        assert await session.command(Kind.CROP, {"epoch": 1}, 4) is None
        refused = await session.command(Kind.FORK, {"from": bytes(32), "to": 0, "epoch": 2})
        assert refused is not None and refused["code"] == "session_unknown"
        session.abort()
        async with back(attacker, session, 1) as again:
            assert (await again.next(Kind.RESUMED)).body == {"position": 4, "epoch": 1}
            await again.send(Frame(Kind.CROP, {"epoch": 1, "id": 1}, 0))
            assert (await again.next(Kind.DONE)).body["of"] == 1
            await again.send(Frame(Kind.FORK, {"from": bytes(32), "to": 0, "epoch": 2, "id": 2}))
            assert (await again.error())["code"] == "session_unknown"
            assert await position(again) == 4, "it was not done a second time"


async def test_only_the_client_comes_back_and_no_claim_serves_twice(attacker: Attacker, first: Target) -> None:
    stranger = Key(secrets.token_bytes(32))
    async with attacker.open(first, max_length=64) as session:
        for bad, code in (
            (claim(attacker, session, 1, stranger), "unauthorized"),
            (claim(attacker, session, 1, session=bytes(32)), "session_unknown"),
            (claim(attacker, session, 1, issued=int(time.time()) - 3600), "unauthorized"),
            (claim(attacker, session, 1, node=attacker.key.address), "unauthorized"),
            (claim(attacker, session, 1, spki=bytes(31) + b"1"), "unauthorized"),
            (claim(attacker, session, 0), "unauthorized"),
            (Frame(Kind.RESUME, {"resume": b"", "receipts": 0, "results": 0}), "bad_message"),
        ):
            async with attacker.connect(first) as connection:
                await connection.send(bad)
                assert (await connection.error())["code"] == code
                await connection.until_closed()
        assert await position(session) == 0, "the session was not disturbed"
        used = claim(attacker, session, 5)
        async with attacker.connect(first) as second:
            await second.send(used)
            await second.next(Kind.RESUMED)
            async with attacker.connect(first) as thief:
                await thief.send(used)
                assert (await thief.error())["code"] == "unauthorized"
            assert await position(second) == 0


async def test_nothing_is_computed_without_a_client_and_its_lease_ends(attacker: Attacker, first: Target) -> None:
    async with attacker.open(first, max_length=256) as session:
        session.abort()
        await attacker.idle(first)
        async with back(attacker, session, 1) as late:
            assert (await late.error())["code"] == "session_unknown"


async def test_who_leaves_in_order_is_not_waited_for(attacker: Attacker, first: Target) -> None:
    async with attacker.open(first, max_length=64) as session:
        pass
    await attacker.idle(first, 2.0)
    async with back(attacker, session, 1) as late:
        assert (await late.error())["code"] == "session_unknown"
