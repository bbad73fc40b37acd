"""A small app behind the node's own listener, with TLS keys of its own, and what came to it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import FastAPI, WebSocket

from tallystick_node.channel import ServerChannel, serve_channel
from tallystick_node.listener import Divert, Listener, bind
from tallystick_node.reach.tls import TlsKeys
from tallystick_protocol.frames import Frame, Kind
from tallystick_protocol.transport.contact import Addr, Contact, label
from tallystick_protocol.types import Address, Digest


@dataclass(slots=True)
class TlsServer:
    """It answers /health, and sends every frame back that comes over /v1/sessions after an OPEN."""

    node: Address
    keys: TlsKeys
    listener: Listener
    port: int
    requests: list[str] = field(default_factory=list)
    spki: list[Digest] = field(default_factory=list)

    @property
    def contact(self) -> Contact:
        return Contact(self.node, (Addr("tcp", "127.0.0.1", self.port),), self.keys.pins, 1)


def echo_app(requests: list[str], spki: list[Digest]) -> FastAPI:
    app = FastAPI()

    @app.get("/health")
    async def health() -> dict[str, str]:
        requests.append("/health")
        return {"status": "ok"}

    async def echo(channel: ServerChannel, first: Frame) -> None:
        spki.append(channel.spki)
        while True:
            await channel.send(first)
            first = await channel.receive()

    @app.websocket("/v1/sessions")
    async def session(ws: WebSocket) -> None:
        await ws.accept()
        await serve_channel(ServerChannel(ws), {Kind.OPEN: echo})

    return app


@asynccontextmanager
async def tls_server(node: Address, folder: Path, divert: Divert | None = None) -> AsyncIterator[TlsServer]:
    """A server on a free port of 127.0.0.1."""
    requests: list[str] = []
    spki: list[Digest] = []
    keys = TlsKeys(folder, frozenset({label(node)}))
    listener = Listener(echo_app(requests, spki), keys, divert)
    listening = bind("127.0.0.1", 0, encrypted=True)
    serving = asyncio.create_task(listener.serve(listening))
    try:
        yield TlsServer(node, keys, listener, listening.getsockname()[1], requests, spki)
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await listener.close(1.0)
        listening.close()


async def until_closed(sock: socket.socket, timeout_s: float) -> bytes:
    """What comes over a connection until the other side ends it. Raises TimeoutError."""
    loop, data = asyncio.get_running_loop(), b""
    async with asyncio.timeout(timeout_s):
        try:
            while part := await loop.sock_recv(sock, 65536):
                data += part
        except ConnectionError:
            pass
    return data
