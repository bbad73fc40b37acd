"""Links with a delay: TCP proxies in a process of their own, one before each node; they count what passes, too.

Commands on standard input, one line each: `delay SECONDS` for every proxy, each way; `count`, answered with the bytes
that have passed since the last time, to the node and from it.
"""

from __future__ import annotations

import asyncio
import json
import selectors
import subprocess
import sys
from collections.abc import Sequence


class Wires:
    """Use as a context manager. `ports` maps each node's own port to the one to announce."""

    def __init__(self, targets: Sequence[int]) -> None:
        command = [sys.executable, "-m", "tallystick_devnet.bench.wires", *map(str, targets)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ports: dict[int, int] = dict(zip(targets, self._read(), strict=True))

    def __enter__(self) -> Wires:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def delay(self, seconds: float) -> None:
        """One way, on every link."""
        self._ask(f"delay {seconds}")

    def count(self) -> list[list[int]]:
        """[to the node, from the node] in bytes since the last time, in the order of the targets."""
        found: list[list[int]] = self._ask("count")
        return found

    def _ask(self, line: str) -> list[list[int]]:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> list:  # type: ignore[type-arg]
        assert self._process.stdout is not None
        found: list = json.loads(self._process.stdout.readline())  # type: ignore[type-arg]
        return found


class Wire:
    """One proxy."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.delay_s = 0.0
        self.passed = [0, 0]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._carry(reader, there_writer, 0), self._carry(there_reader, writer, 1))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: int) -> None:
        loop = asyncio.get_running_loop()
        try:
            while data := await reader.read(1 << 18):
                self.passed[way] += len(data)
                if self.delay_s:
                    loop.call_later(self.delay_s, _write, writer, data)
                else:
                    writer.write(data)
                    await writer.drain()
        except ConnectionError:
            pass
        loop.call_later(self.delay_s, writer.close)


def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    if not writer.is_closing():
        writer.write(data)


async def main() -> None:
    wires = [Wire(int(target)) for target in sys.argv[1:]]
    servers = [await asyncio.start_server(wire.serve, "127.0.0.1", 0) for wire in wires]
    _say([server.sockets[0].getsockname()[1] for server in servers])
    while line := await asyncio.to_thread(sys.stdin.readline):
        word, _, value = line.strip().partition(" ")
        if word == "delay":
            for wire in wires:
                wire.delay_s = float(value)
        passed = [list(wire.passed) for wire in wires]
        for wire in wires:
            wire.passed = [0, 0]
        _say(passed)
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # connections that are open now are no fault


def _say(found: object) -> None:
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


def _exact() -> asyncio.AbstractEventLoop:
    """An event loop whose timers are not rounded up to whole milliseconds, as epoll's are."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=_exact) as runner:
        runner.run(main())
