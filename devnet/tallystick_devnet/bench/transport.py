"""What TLS and a relay cost: round trips of frames through the node's own listener and peers, between processes.

    python -m tallystick_devnet.bench.transport [--seconds S] [--json]

Three processes on loopback (client, node, relay), uvloop in each, nothing computed: the node sends frames back.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop
from fastapi import FastAPI, WebSocket

from tallystick_node.channel import ServerChannel, serve_channel
from tallystick_node.listener import Listener, bind
from tallystick_node.reach.tls import TlsKeys
from tallystick_node.relay.hello import dial_back_line
from tallystick_node.relay.switchboard import Registration, RelayLimits, Switchboard
from tallystick_protocol.errors import Unreachable
from tallystick_protocol.frames import DType, Frame, Kind, rows_frame
from tallystick_protocol.peer import Channel, Peers
from tallystick_protocol.transport.contact import Addr, Contact, label
from tallystick_protocol.types import Address

NODE, RELAY = Address("0x" + "11" * 20), Address("0x" + "22" * 20)
SIZES = {"8KB": 8 << 10, "1MB": 1 << 20}
WAYS = ("plain", "tls", "relay")


class _Uncounted:
    """Bytes that nobody pays for."""

    num_bytes = num_sockets = 0

    def count(self, num_bytes: int) -> bool:
        self.num_bytes += num_bytes
        return True

    async def allowed(self) -> None: ...


async def _serve_relay(folder: Path) -> None:
    board, keys = Switchboard(RELAY, RelayLimits()), TlsKeys(folder / "relay", frozenset({label(RELAY)}))
    app = FastAPI()

    async def register(channel: Channel, _: Frame) -> None:
        board.register(Registration(NODE, channel, _Uncounted()))  # type: ignore[arg-type]
        await channel.send(Frame(Kind.REGISTERED))
        await channel.receive()

    @app.websocket("/v1/relay")
    async def control(ws: WebSocket) -> None:
        await ws.accept()
        await serve_channel(ServerChannel(ws), {Kind.REGISTER: register})

    listening = bind("127.0.0.1", 0, encrypted=True)
    print(json.dumps({"port": listening.getsockname()[1], "pins": [pin.hex() for pin in keys.pins]}), flush=True)
    await Listener(app, keys, board.divert).serve(listening)


async def _serve_node(folder: Path, relay_port: int, relay_pins: list[str]) -> None:
    keys, app = TlsKeys(folder / "node", frozenset({label(NODE)})), FastAPI()

    async def echo(channel: Channel, frame: Frame) -> None:
        while True:
            await channel.send(frame)
            frame = await channel.receive()

    @app.websocket("/v1/sessions")
    async def session(ws: WebSocket) -> None:
        await ws.accept()
        await serve_channel(ServerChannel(ws), {Kind.OPEN: echo})

    plain, encrypted = Listener(app), Listener(app, keys)
    ports = [bind("127.0.0.1", 0, encrypted=True) for _ in range(2)]
    relay = Contact(RELAY, (Addr("tcp", "127.0.0.1", relay_port),), tuple(map(bytes.fromhex, relay_pins)))
    control = await Peers().connect(relay, RELAY, "/v1/relay")
    await control.send(Frame(Kind.REGISTER))
    await control.receive()
    told = {"ports": [port.getsockname()[1] for port in ports], "pins": [pin.hex() for pin in keys.pins]}
    print(json.dumps(told), flush=True)

    async def dial_back() -> None:
        loop = asyncio.get_running_loop()
        while True:
            token = (await control.receive()).body["token"]
            sock = socket.create_connection(("127.0.0.1", relay_port))
            sock.setblocking(False)
            await loop.sock_sendall(sock, dial_back_line(token))
            await encrypted.attach(sock, "dialled back")

    await asyncio.gather(plain.serve(ports[0]), encrypted.serve(ports[1]), dial_back())


def _child(*arguments: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    command = [sys.executable, "-m", "tallystick_devnet.bench.transport", *arguments]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    return child, json.loads(child.stdout.readline())


async def _round_trips(channel: Channel, size: int, seconds: float) -> list[float]:
    frame, took = rows_frame(Kind.STEP, DType.F32, [bytes(size)], 0, {}), []
    ends = time.perf_counter() + seconds
    while (began := time.perf_counter()) < ends:
        await channel.send(frame)
        await channel.receive()
        took.append(time.perf_counter() - began)
    return took


async def measure(seconds: float) -> dict[str, float]:
    """Medians in milliseconds: opening a connection, and round trips by size, for each way to the node."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        relay, its = _child("--serve-relay", folder)
        node, told = _child("--serve-node", folder, str(its["port"]), *its["pins"])
        pins = tuple(map(bytes.fromhex, told["pins"]))
        places = dict(zip(WAYS, (*told["ports"], its["port"]), strict=True))
        try:
            for way, port in places.items():
                contact = Contact(NODE, (Addr("tcp", "127.0.0.1", port),), () if way == "plain" else pins)
                opened = []
                for _ in range(12):
                    peers, began = Peers(), time.perf_counter()
                    channel = await peers.connect(contact, NODE)
                    await channel.send(Frame(Kind.OPEN))
                    await channel.receive()
                    opened.append(time.perf_counter() - began)
                    await channel.close()
                    await peers.close()
                figures[f"{way}_open_ms"] = statistics.median(opened) * 1e3
            channels = {}
            peers = Peers()
            for way, port in places.items():
                contact = Contact(NODE, (Addr("tcp", "127.0.0.1", port),), () if way == "plain" else pins)
                channels[way] = await peers.connect(contact, NODE)
                await channels[way].send(Frame(Kind.OPEN))
                await channels[way].receive()
            for name, size in SIZES.items():
                rounds: dict[str, list[float]] = {way: [] for way in places}
                for _ in range(5):  # interleaved: other work on the machine falls on all alike
                    for way, channel in channels.items():
                        rounds[way] += await _round_trips(channel, size, seconds / 5)
                for way, took in rounds.items():
                    figures[f"{way}_{name}_ms"] = statistics.median(took) * 1e3
                    cuts = statistics.quantiles(took, n=100)
                    figures[f"{way}_{name}_p10_ms"], figures[f"{way}_{name}_p99_ms"] = cuts[9] * 1e3, cuts[98] * 1e3
            await peers.close()
        except Unreachable:
            raise SystemExit("a child process is gone") from None
        finally:
            for child in (node, relay):
                child.kill()
                child.wait()
    return {name: round(value, 4) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve-relay", nargs=1, help=argparse.SUPPRESS)
    parser.add_argument("--serve-node", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_relay:
        uvloop.run(_serve_relay(Path(options.serve_relay[0])))
    elif options.serve_node:
        folder, port, *pins = options.serve_node
        uvloop.run(_serve_node(Path(folder), int(port), pins))
    else:
        figures = uvloop.run(measure(options.seconds))
        print(json.dumps(figures) if options.json else "\n".join(f"{k:24} {v:8.3f}" for k, v in figures.items()))


if __name__ == "__main__":
    main()
