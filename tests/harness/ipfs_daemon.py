"""A real js-ipfs daemon for tests: cut off from the network, on free loopback ports, in a folder of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
START_S = 60.0
STOP_S = 10.0


@dataclass(frozen=True, slots=True)
class Program:
    """The installed daemon."""

    node: Path
    script: Path


@dataclass(slots=True)
class Daemon:
    """A running daemon; `stop` and `start` keep its folder and its ports."""

    program: Program
    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def addr(self) -> str:
        """For `DaemonStore`."""
        return f"/ip4/127.0.0.1/tcp/{self.port}"

    def run(self, *arguments: str) -> None:
        """One command to its end."""
        subprocess.run(self._command(*arguments), env=self._environment(), check=True, capture_output=True, timeout=60)

    def start(self) -> None:
        """Returns when the RPC answers."""
        with (self.folder / "daemon.log").open("ab") as log:
            self.process = subprocess.Popen(
                self._command("daemon"),
                env=self._environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                log_tail = (self.folder / "daemon.log").read_text(errors="replace")[-2000:]
                self.stop()
                raise RuntimeError(f"js-ipfs did not answer within {START_S:g} s:\n{log_tail}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Ends the daemon, by force if it does not go."""
        if self.process is None:
            return
        # PyPI's `node` is a Python script around the real one, hence the whole group.
        deadline = time.monotonic() + STOP_S
        self._signal(signal.SIGTERM)
        while self._signal(0) and time.monotonic() < deadline:
            time.sleep(0.05)
        self._signal(signal.SIGKILL)
        self.process.wait(STOP_S)
        self.process = None
        (self.folder / "api").unlink(missing_ok=True)
        shutil.rmtree(self.folder / "repo.lock", ignore_errors=True)

    def _signal(self, number: int) -> bool:
        """False once the whole group is gone."""
        if self.process is None:
            return False
        self.process.poll()
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return False
        return True

    def _answers(self) -> bool:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/api/v0/id", method="POST")
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=2) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _command(self, *arguments: str) -> list[str]:
        return [str(self.program.node), str(self.program.script), *arguments]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "IPFS_PATH": str(self.folder)}


def find_program() -> Program | None:
    """js-ipfs where `scripts/install --ipfs` puts it, or in $TALLYSTICK_IPFS; None when it is not installed."""
    folder = Path(os.environ.get("TALLYSTICK_IPFS", REPOSITORY / ".ipfs"))
    script = folder / "node_modules" / "ipfs" / "src" / "cli.js"
    beside_python = Path(sys.executable).parent / "node"
    node = str(beside_python) if beside_python.exists() else shutil.which("node")
    if not script.exists() or node is None:
        return None
    return Program(Path(node), script)


@contextmanager
def running(program: Program, folder: Path) -> Iterator[Daemon]:
    """A fresh daemon that knows nobody."""
    api, gateway = _free_ports(2)
    daemon = Daemon(program, folder, api)
    folder.mkdir(parents=True)
    daemon.run("init", "--empty-repo")
    path = folder / "config"
    config = json.loads(path.read_text())
    config["Addresses"] |= {
        "Swarm": [],
        "API": f"/ip4/127.0.0.1/tcp/{api}",
        "Gateway": f"/ip4/127.0.0.1/tcp/{gateway}",
        "RPC": f"/ip4/127.0.0.1/tcp/{_free_ports(1)[0]}",
        "Delegates": [],
    }
    config["Bootstrap"] = []
    config["Discovery"] = {"MDNS": {"Enabled": False}, "webRTCStar": {"Enabled": False}}
    path.write_text(json.dumps(config))
    daemon.start()
    try:
        yield daemon
    finally:
        daemon.stop()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports
