"""A crowd at the door: peers that ask for nothing, that read nothing, that never end what they have begun."""

from __future__ import annotations

import asyncio
import base64
import os
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from harness import samples
from harness.tls_server import echo_app, tls_server
from harness.waiting import eventually
from tallystick_node import listener as listener_module
from tallystick_node import lobby
from tallystick_node.listener import Listener, bind
from tallystick_node.reach import desk
from tallystick_protocol.frames import Frame, Kind
from tallystick_protocol.peer import Peers, WebSocketChannel
from tallystick_protocol.transport.pins import any_key_context

NODE = samples.address("node")
PLACES = 6
PING = bytes([0x89, 0x80 | 125]) + bytes(4 + 125)
GOODBYE = bytes([0x88, 0x82]) + bytes(4) + (1000).to_bytes(2, "big")


@pytest.fixture
def crowd() -> Any:
    """Sockets that are closed at the end."""
    with ExitStack() as stack:
        yield stack


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[tuple[Listener, int]]:
    """Plain, on a free port of 127.0.0.1."""
    listener, listening = Listener(app), bind("127.0.0.1", 0, encrypted=False)
    task = asyncio.create_task(listener.serve(listening))
    try:
        yield listener, listening.getsockname()[1]
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await listener.close(1.0)
        listening.close()


def dial(crowd: ExitStack, port: int) -> socket.socket:
    """A connection that takes little before it is read."""
    sock = crowd.enter_context(socket.socket())
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(10)
    sock.connect(("127.0.0.1", port))
    return sock


def upgrade(sock: socket.socket) -> socket.socket:
    """A WebSocket on which no frame was sent."""
    key = base64.b64encode(os.urandom(16)).decode()
    sock.sendall(
        f"GET /v1/sessions HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    head = b""
    while b"\r\n\r\n" not in head:
        head += sock.recv(1)
    assert head.startswith(b"HTTP/1.1 101")
    return sock


def is_ended(sock: socket.socket) -> bool:
    sock.settimeout(0.0)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


async def ask(url: str) -> bytes:
    peers = Peers()
    try:
        return await peers.ask(url, "/health", 100, 5.0)
    finally:
        await peers.close()


async def session(peers: Peers, to: Any) -> WebSocketChannel:
    """A session of the echo app."""
    channel = await peers.connect(to, NODE)
    await echoes(channel, Kind.OPEN)
    return channel


async def echoes(channel: WebSocketChannel, kind: Kind) -> None:
    await channel.send(Frame(kind))
    async with asyncio.timeout(5):
        assert (await channel.receive()).kind is kind


async def test_a_full_house_takes_the_next_one_in_the_place_of_who_asks_for_nothing(
    monkeypatch: pytest.MonkeyPatch, crowd: ExitStack
) -> None:
    """Sessions keep their places; of the others the one that came first goes, a WebSocket without a frame as well."""
    monkeypatch.setattr(listener_module, "MAX_CONNECTIONS", PLACES)
    peers = Peers()
    async with serving(echo_app([], [])) as (listener, port):
        url = f"http://127.0.0.1:{port}"
        served = await session(peers, url)
        silent = [await asyncio.to_thread(lambda: upgrade(dial(crowd, port)))]
        half = dial(crowd, port)
        half.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nX-")
        silent += [half, *(dial(crowd, port) for _ in range(PLACES - 3))]
        await eventually("a full house", lambda: len(listener._state.connections) == PLACES)
        for number, loser in enumerate(silent[:3]):
            assert await ask(url) == b'{"status":"ok"}'
            await eventually(f"silent one {number} to go", lambda loser=loser: is_ended(loser))
            silent.append(dial(crowd, port))
            await eventually("a full house again", lambda: len(listener._state.connections) == PLACES)
        assert not any(is_ended(sock) for sock in silent[3:])
        await echoes(served, Kind.STEP)
        await served.close()
    await peers.close()


async def test_where_everybody_has_a_session_nobody_loses_it(monkeypatch: pytest.MonkeyPatch, crowd: ExitStack) -> None:
    monkeypatch.setattr(listener_module, "MAX_CONNECTIONS", 2)
    peers = Peers()
    async with serving(echo_app([], [])) as (_, port):
        served = [await session(peers, f"http://127.0.0.1:{port}") for _ in range(2)]
        refused = dial(crowd, port)
        await eventually("the third one to be refused", lambda: is_ended(refused))
        for channel in served:
            await echoes(channel, Kind.STEP)
            await channel.close()
    await peers.close()


async def test_it_is_the_same_under_tls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(listener_module, "MAX_CONNECTIONS", 3)
    peers = Peers()
    async with tls_server(NODE, tmp_path) as server:
        served = await session(peers, server.contact)
        for _ in range(5):
            _, writer = await asyncio.open_connection(
                "127.0.0.1", server.port, ssl=any_key_context(), server_hostname=server.contact.label
            )
        assert await peers.ask(server.contact, "/health", 100, 5.0) == b'{"status":"ok"}'
        await echoes(served, Kind.STEP)
        await served.close()
        writer.transport.abort()
    await peers.close()


async def test_whoever_shakes_hands_for_longest_gives_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, crowd: ExitStack
) -> None:
    monkeypatch.setattr(listener_module, "MAX_WELCOMES", 3)
    peers = Peers()
    async with tls_server(NODE, tmp_path) as server:
        slow = [dial(crowd, server.port) for _ in range(3)]
        await eventually("all to be welcomed", lambda: len(server.listener._welcomes) == 3)
        assert await peers.ask(server.contact, "/health", 100, 5.0) == b'{"status":"ok"}'
        await eventually("the first one to go", lambda: is_ended(slow[0]))
        assert not any(is_ended(sock) for sock in slow[1:])
    await peers.close()


async def test_pings_of_a_peer_that_does_not_read_are_not_answered_from_memory(crowd: ExitStack) -> None:
    async with serving(echo_app([], [])) as (listener, port):
        sock = await asyncio.to_thread(lambda: upgrade(dial(crowd, port)))
        sock.settimeout(20)
        await asyncio.to_thread(sock.sendall, PING * (16 * 1024 * 1024 // len(PING)))
        (protocol,) = listener._state.connections
        assert protocol.transport.get_write_buffer_size() < 1 << 20


LARGE = 64


def large_app() -> FastAPI:
    app = FastAPI()

    @app.get("/large")
    async def large() -> StreamingResponse:
        return StreamingResponse(bytes(1 << 20) for _ in range(LARGE))

    return app


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system has no such timeout")
@pytest.mark.parametrize("way", ["a download", "a websocket that was closed"])
async def test_who_does_not_read_is_forgotten(monkeypatch: pytest.MonkeyPatch, crowd: ExitStack, way: str) -> None:
    monkeypatch.setattr(lobby, "UNREAD_TIMEOUT_S", 0.5)
    app = large_app() if way == "a download" else echo_app([], [])
    async with serving(app) as (listener, port):
        sock = dial(crowd, port)
        if way == "a download":
            sock.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
        else:
            await asyncio.to_thread(upgrade, sock)
        await eventually("the connection", lambda: len(listener._state.connections) == 1)
        if way != "a download":
            (protocol,) = listener._state.connections
            with suppress(ConnectionError):  # a machine that is busy takes as long to send as it takes to be forgotten
                await asyncio.to_thread(sock.sendall, PING * (16 * 1024 * 1024 // len(PING)))
            protocol.transport.close()  # what waits for the peer is written first
        await eventually("it to be forgotten", lambda: not listener._state.connections, 20.0)


async def test_a_listener_closes_whatever_its_peers_have_begun(crowd: ExitStack) -> None:
    """One has said goodbye and reads nothing, so that it is closing for as long as it likes; one is in a session."""
    peers = Peers()
    async with serving(echo_app([], [])) as (listener, port):
        served = await session(peers, f"http://127.0.0.1:{port}")
        leaving = await asyncio.to_thread(lambda: upgrade(dial(crowd, port)))
        before = set(listener._state.connections)
        await asyncio.to_thread(leaving.sendall, PING * (8 * 1024 * 1024 // len(PING)) + GOODBYE)
        closing = [one.transport for one in before]  # type: ignore[union-attr]
        await eventually("it to leave", lambda: any(transport.is_closing() for transport in closing))
        await listener.close(1.0)
        await eventually("all to end", lambda: not listener._state.connections)
        await served.close()
    await peers.close()


async def test_a_record_that_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch, crowd: ExitStack) -> None:
    monkeypatch.setattr(desk, "BODY_TIMEOUT_S", 0.2)
    app = FastAPI()
    taken: list[bytes] = []

    async def take(data: bytes) -> list[bool]:
        taken.append(data)
        return []

    answering: Any = SimpleNamespace(take=take)
    desk.add_reach_routes(app, answering)
    async with serving(app) as (_, port):
        sock = dial(crowd, port)
        sock.sendall(b"POST /v1/reach HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nabc")
        answer = await asyncio.to_thread(sock.recv, 4096)
        assert answer.startswith(b"HTTP/1.1 ") and not taken
