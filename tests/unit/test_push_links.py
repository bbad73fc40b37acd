"""Push connections, against a WebSocket server of another make: they answer pings, and their end is told at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from harness import samples
from tallystick_node.session.downstream import Downstream
from tallystick_node.session.links import Dialler
from tallystick_node.session.record import Record
from tallystick_protocol.errors import TallystickError, Unreachable
from tallystick_protocol.frames import DType, Frame, Kind
from tallystick_protocol.peer import Peers
from tallystick_protocol.transport.contact import Addr, Contact
from tallystick_protocol.types import Address, Positions, SessionId

NEXT = samples.address("next")
SESSION = SessionId(samples.digest("session"))


class NextHop:
    """Takes one push connection; what comes over it, pongs too, is in `messages`."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[aiohttp.WSMessage] = asyncio.Queue()
        self.socket: web.WebSocketResponse | None = None
        self.num_opened = 0
        self.hangs_up = False
        self.epochs: list[int] = []

    async def serve(self, request: web.Request) -> web.WebSocketResponse:
        socket = self.socket = web.WebSocketResponse(autoping=False)
        await socket.prepare(request)
        first = Frame.decode((await socket.receive()).data)
        assert first.kind is Kind.PUSH_OPEN
        self.epochs.append(first.body["epoch"])
        self.num_opened += 1
        await socket.send_bytes(Frame(Kind.PUSH_OPENED, {"position": 0, "epoch": 0}).encode())
        async for message in socket:
            self.messages.put_nowait(message)
        return socket

    async def next(self) -> aiohttp.WSMessage:
        async with asyncio.timeout(5):
            return await self.messages.get()


@asynccontextmanager
async def connected(told: list[TallystickError]) -> AsyncIterator[tuple[NextHop, Downstream]]:
    """A hop with two rows that is connected to the next one."""
    hop, app, peers = NextHop(), web.Application(), Peers()
    app.router.add_get("/v1/sessions", hop.serve)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    record = Record(False)
    record.append([b"a", b"b"], [bytes(8), bytes(8)], [False, False])

    async def find(node: Address) -> Contact:
        return Contact(node, (Addr("tcp", "127.0.0.1", port),))

    dialler = Dialler(peers, samples.address("me"), samples.key("me"), samples.STAKING, find, lambda: 0.0)

    async def tell(error: TallystickError) -> None:
        told.append(error)

    async def reconnect() -> None:
        if hop.hangs_up:
            raise Unreachable("nobody there")
        link = await downstream.dial()
        assert link is not None
        await downstream.join(link, {})

    downstream = Downstream(dialler, SESSION, 0, NEXT, record, DType.F32, 0, tell, reconnect)
    try:
        link = await downstream.dial()
        assert link is not None
        await downstream.join(link, {})
        yield hop, downstream
    finally:
        await downstream.close()
        await peers.close()
        await runner.cleanup()


async def test_a_link_answers_pings_although_the_next_hop_says_nothing() -> None:
    told: list[TallystickError] = []
    async with connected(told) as (hop, _):
        assert Frame.decode((await hop.next()).data).kind is Kind.STEP
        assert hop.socket is not None
        await hop.socket.ping(b"1234")
        pong = await hop.next()
        assert (pong.type, bytes(pong.data)) == (aiohttp.WSMsgType.PONG, b"1234")
    assert not told, "closing it is no loss"


@pytest.mark.parametrize("silent", [True, False])
async def test_a_next_hop_that_hangs_up_is_told_of_before_anything_is_sent_to_it(silent: bool) -> None:
    told: list[TallystickError] = []
    async with connected(told) as (hop, downstream):
        assert hop.socket is not None
        hop.hangs_up = True
        if not silent:
            await hop.socket.send_str("text")
        await hop.socket.close()
        async with asyncio.timeout(5):
            while not told:
                await asyncio.sleep(0.01)
        assert [(error.code, error.fields["hop"]) for error in told] == [("unreachable", NEXT)]
        await downstream.pass_on(Positions(0, 2))
        await downstream.enter(1, 0)
        assert len(told) == 1, "the rows are kept; it is told once"


async def test_a_link_that_was_cut_is_dialled_again_and_nobody_hears_of_it() -> None:
    told: list[TallystickError] = []
    async with connected(told) as (hop, downstream):
        assert Frame.decode((await hop.next()).data).kind is Kind.STEP
        await downstream.enter(1, 1)
        assert Frame.decode((await hop.next()).data).body == {"epoch": 1}
        assert hop.socket is not None
        await hop.socket.close()
        again = Frame.decode((await hop.next()).data)
        assert (again.kind, again.position, hop.num_opened, hop.epochs) == (Kind.STEP, 0, 2, [0, 1])
    assert not told


async def test_another_link_in_its_place_is_no_loss() -> None:
    told: list[TallystickError] = []
    async with connected(told) as (hop, downstream):
        again = await downstream.dial()
        assert again is not None
        await downstream.join(again, {})
        assert hop.num_opened == 2
    assert not told


async def test_an_auditors_link_that_ended_is_dialled_anew_by_the_next_replay() -> None:
    told: list[TallystickError] = []
    async with connected(told) as (hop, downstream):
        other = SessionId(samples.digest("other"))
        for times in (2, 3):
            await downstream.replay(Positions(0, 2), samples.address("auditor"), other, {})
            assert hop.num_opened == times and hop.socket is not None
            await hop.socket.close()
            async with asyncio.timeout(5):
                while downstream._side:
                    await asyncio.sleep(0.01)
    assert not told
