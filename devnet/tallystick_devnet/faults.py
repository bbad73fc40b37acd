"""Faults of every kind, for nodes of a local network: processes that die, hang or stop, links that are cut or slow.

A node that is to have such a link announces a TCP proxy's address in place of its own: clients and other nodes dial the
proxy. Everything may be called from any thread.
"""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from tallystick_devnet.localnet import NODE_COMMAND, LocalNet, LocalNode
from tallystick_devnet.processes import stop_all
from tallystick_protocol.types import ModelId, Span

T = TypeVar("T")
CHUNK = 1 << 16
PORTS = range(20_000, 32_000)
"""Below those that the system gives to connections."""


class Link:
    """A TCP proxy before one port of this machine."""

    def __init__(self, loop: asyncio.AbstractEventLoop, target: int) -> None:
        self._loop = loop
        self.target = target
        self._pairs: dict[int, tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = {}
        self._pumps: set[asyncio.Task[None]] = set()
        self._is_down = False
        self._delay_s = 0.0
        self._server: asyncio.Server | None = None
        self.port = self._call(self._listen)

    def cut(self, keep: Collection[int] = ()) -> int:
        """Reset the connections that there are; returns how many. keep: but for those from these local ports."""

        async def cut() -> int:
            pairs = [pair for port, pair in self._pairs.items() if port not in keep]
            for writer in (writer for pair in pairs for writer in pair):
                writer.transport.abort()
            return len(pairs)

        return self._call(cut)

    def down(self) -> None:
        """Reset every connection, and each one that is dialled, until `up`."""
        self._is_down = True
        self.cut()

    def up(self) -> None:
        self._is_down = False

    def slow(self, delay_s: float) -> None:
        """Whatever passes arrives so much later, in either direction."""
        self._delay_s = delay_s

    def close(self) -> None:
        async def close() -> None:
            assert self._server is not None
            self._server.close()
            for pump in self._pumps:
                pump.cancel()

        self._call(close)

    async def _listen(self) -> int:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        port: int = writer.get_extra_info("peername")[1]
        try:
            if self._is_down:
                raise ConnectionResetError
            theirs, to_node = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._pairs[port] = writer, to_node
        pumps = [asyncio.create_task(self._pump(reader, to_node)), asyncio.create_task(self._pump(theirs, writer))]
        self._pumps.update(pumps)
        await asyncio.wait(pumps)
        self._pumps.difference_update(pumps)
        self._pairs.pop(port, None)
        writer.transport.abort()
        to_node.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(CHUNK):
                if self._delay_s:
                    await asyncio.sleep(self._delay_s)
                writer.write(data)
                await writer.drain()
            writer.write_eof()
        except OSError:
            writer.transport.abort()

    def _call(self, work: Callable[[], Awaitable[T]]) -> T:
        async def run() -> T:
            return await work()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(30)


@dataclass(slots=True)
class Victim:
    """A node whose link can be cut."""

    node: LocalNode
    link: Link
    settings: list[str]
    command: Sequence[str]

    @property
    def port(self) -> int:
        """The node's own, without the proxy."""
        return self.link.target


class Faults:
    """Nodes behind proxies. Use as a context manager, within that of the network."""

    def __init__(self, net: LocalNet, model: ModelId) -> None:
        self._net = net
        self._model = model
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="links", daemon=True)
        self.victims: list[Victim] = []

    def __enter__(self) -> Faults:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for victim in self.victims:
            victim.node.process.go_on()
            victim.link.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def add(self, span: Span, settings: Collection[str] = (), command: Sequence[str] = NODE_COMMAND) -> Victim:
        """Start a node behind a proxy; wait for it with `node.wait()`. command: what runs it, without arguments."""
        port = free_port()
        link = Link(self._loop, port)
        places = ["--port", str(port), "--announce", f"127.0.0.1:{link.port}", "--tls", "off", *settings]
        victim = Victim(self._net.add_node(self._model, span, command, places), link, places, command)
        self.victims.append(victim)
        return victim

    def stop(self) -> None:
        """Stop all of these nodes, when the network goes on without them."""
        for victim in self.victims:
            victim.node.process.go_on()
        stop_all([victim.node.process for victim in self.victims])

    def of(self, address: str) -> Victim:
        return next(victim for victim in self.victims if victim.node.address == address)

    def restart(self, victim: Victim) -> None:
        """Start a process that has ended again, where it was, and wait until it serves."""
        self._restart(victim)
        victim.node.wait()

    def revive(self) -> None:
        """Undo everything: what has ended is started again."""
        for victim in self.victims:
            victim.link.up()
            victim.link.slow(0.0)
            victim.node.process.go_on()
        ended = [victim for victim in self.victims if not victim.node.process.alive]
        for victim in ended:
            self._restart(victim)
        for victim in ended:
            victim.node.wait()

    def _restart(self, victim: Victim) -> None:
        self._net.restart(victim.node, self._model, victim.command, victim.settings)


def free_port() -> int:
    """A port of this machine that nobody uses."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
