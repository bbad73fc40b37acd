"""A node's own Reach: dialled by others before it is announced, and those others when they are asked to dial."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from fastapi import FastAPI

from harness import samples
from harness.tls_server import TlsServer, tls_server
from tallystick_node.listener import Listener, bind
from tallystick_node.reach import announcer as announcer_module
from tallystick_node.reach.announcer import Announcer
from tallystick_node.reach.desk import ReachDesk, add_reach_routes
from tallystick_node.reach.tls import TlsKeys
from tallystick_protocol.errors import BadMessage, ConfigError, Overloaded, Unauthorized
from tallystick_protocol.peer import Peers
from tallystick_protocol.transport.contact import Addr, Contact, label
from tallystick_protocol.transport.directory import Directory
from tallystick_protocol.transport.reach import Reach, seal_reach, unseal_reach
from tallystick_protocol.transport.scopes import like
from tallystick_protocol.types import Address

NODE, OTHER, RELAY = samples.address("node"), samples.address("other"), samples.address("relay")
CLOSED = Addr("tcp", "127.0.0.1", 1)


@asynccontextmanager
async def desk_of(node: Address, folder: Path, staked: set[Address]) -> AsyncIterator[tuple[ReachDesk, Contact]]:
    """Another node, as far as it dials and remembers."""
    peers, keys = Peers(like(["127.0.0.1"])), TlsKeys(folder, frozenset({label(node)}))
    directory = Directory(peers, samples.STAKING, lambda _: NODE, lambda _: None)
    desk, app = ReachDesk(node, directory, peers, lambda: None, staked.__contains__), FastAPI()
    add_reach_routes(app, desk)
    listening = bind("127.0.0.1", 0, encrypted=True)
    listener = Listener(app, keys)
    serving = asyncio.create_task(listener.serve(listening))
    try:
        yield desk, Contact(node, (Addr("tcp", "127.0.0.1", listening.getsockname()[1]),), keys.pins, 1)
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await listener.close(1.0)
        listening.close()
        await peers.close()


def announcer(server: TlsServer, peers: Peers, addrs: tuple[Addr, ...], *others: Contact) -> Announcer:
    async def found() -> list[Contact]:
        return list(others)

    return Announcer(NODE, samples.key("hot"), samples.STAKING, server.keys, addrs, peers, found)


async def test_what_nobody_could_dial_is_not_announced(tmp_path: Path) -> None:
    async with (
        tls_server(NODE, tmp_path / "node") as server,
        desk_of(OTHER, tmp_path / "other", {NODE}) as (desk, other),
    ):
        peers, works = Peers(), server.contact.addrs[0]
        made = announcer(server, peers, (CLOSED, works), other)
        contact = await made.announce()
        assert contact.addrs == (works,) and made.sealed is not None
        assert unseal_reach(samples.STAKING, made.sealed)[0].addrs == (works,)
        assert desk.give(NODE) is not None, "who has dialled it hands its record on"
        desk._asked.clear()
        with pytest.raises(ConfigError, match="no other node could dial"):
            await announcer(server, peers, (CLOSED,), other).announce()
        with pytest.raises(ConfigError, match="no port"):
            await announcer(server, peers, (), other).announce()
        assert server.requests == []
        await peers.close()


async def test_where_nobody_answers_all_is_announced_and_tried_again_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcer_module, "TRY_AGAIN_S", 0.05)
    async with tls_server(NODE, tmp_path / "node") as server, desk_of(OTHER, tmp_path / "other", {NODE}) as (_, other):
        peers, works, others = Peers(), server.contact.addrs[0], [Contact(OTHER, (CLOSED,), server.keys.pins, 1)]

        async def found() -> list[Contact]:
            return others

        made = Announcer(NODE, samples.key("hot"), samples.STAKING, server.keys, (CLOSED, works), peers, found)
        assert (await made.announce()).addrs == (CLOSED, works)
        keeping = asyncio.create_task(made.keep(3600.0))
        others[:] = [other]
        async with asyncio.timeout(10):
            while unseal_reach(samples.STAKING, made.sealed or b"")[0].addrs != (works,):
                await asyncio.sleep(0.02)
        keeping.cancel()
        await peers.close()


async def test_a_relay_that_comes_and_goes_and_a_new_key_change_the_record(tmp_path: Path) -> None:
    async with tls_server(NODE, tmp_path / "node") as server:
        peers, works = Peers(), server.contact.addrs[0]
        made = announcer(server, peers, (works,))
        through = Addr("relay", "203.0.113.9", 443, via=RELAY)
        first = await made.announce()
        made.relayed(RELAY, through)
        await made.wait_for_relays(1, 5.0)
        second = await made.announce()
        made.relayed(RELAY, None)
        server.keys.rotate()
        third = await made.announce()
        assert [first.addrs, second.addrs, third.addrs] == [(works,), (works, through), (works,)]
        assert first.seq < second.seq < third.seq and third.pins[0] == first.pins[1]
        await peers.close()


# -- being dialled on request


async def test_a_staked_nodes_addresses_are_dialled_and_nothing_else(tmp_path: Path) -> None:
    async with tls_server(NODE, tmp_path / "node") as server:
        places = (*server.contact.addrs, Addr("tcp", "127.0.0.1", 1), Addr("tcp", "10.255.0.1", 80), Addr("x", "?", 1))
        peers = Peers(like(["127.0.0.1"]))
        directory = Directory(peers, samples.STAKING, lambda _: NODE, lambda _: None)
        staked = {NODE}
        desk = ReachDesk(RELAY, directory, peers, lambda: None, staked.__contains__)

        def reach(seq: int, addrs: tuple[Addr, ...] = places, signer: str = "hot") -> bytes:
            record = Reach(NODE, seq, int(time.time()) + 60, server.keys.pins, addrs)
            return seal_reach(samples.STAKING, record, samples.key(signer))

        assert await desk.take(reach(1)) == [True, False, False, False]
        assert desk.give(NODE) == directory.sealed(NODE) is not None
        with pytest.raises(Overloaded, match="a moment ago"):
            await desk.take(reach(2))
        desk._asked.clear()
        assert await desk.take(reach(3, (Addr("tcp", "127.0.0.1", 1),))) == [False]
        known = directory.known(NODE)
        assert known is not None and known.seq == 1, "an address that nobody reached is not handed on"
        desk._asked.clear()
        staked.clear()
        with pytest.raises(Unauthorized, match="no stake"):
            await desk.take(reach(4))
        with pytest.raises(BadMessage):
            await desk.take(b"{}")
        assert server.requests == [] and desk.give(samples.address("nobody")) is None
        await peers.close()
