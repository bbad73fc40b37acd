"""A relay of one's own, for nodes of the local network that shall have no port."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tallystick_devnet.localchain import LocalChain
from tallystick_devnet.processes import Process, start
from tallystick_protocol.keystore import create_keystore
from tallystick_protocol.types import Address, Wei

Launch = Callable[[str, Sequence[str], Path], Process]
READY = r"relaying as (\S+)"
READY_TIMEOUT_S = 30.0


@dataclass(slots=True)
class LocalRelay:
    """name: what nodes have in their setting `relays`."""

    address: Address
    command: list[str]
    folder: Path
    launch: Launch
    process: Process
    name: str = ""

    def restart(self) -> None:
        """Start it again, with the key, the state and the port it had."""
        port = self.name.rpartition(":")[2]
        self.process = _start(self.launch, [*self.command, "--port", port], self.folder)
        self.name = self.process.wait_for(READY, READY_TIMEOUT_S)


def start_relay(
    chain: LocalChain,
    folder: Path,
    password: str,
    settings: Sequence[str] = (),
    *,
    host: str = "127.0.0.1",
    launch: Launch = start,
) -> LocalRelay:
    """Start a relay with a key of its own on a free port, and wait until it serves. Raises ProcessFailed.

    launch(name, command, log): how its process is started.
    """
    folder.mkdir(parents=True)
    (folder / "password").touch(mode=0o600)
    (folder / "password").write_text(password + "\n")
    address = create_keystore(folder / "key.json", password, fast=True)
    chain.give(address, tokens=Wei(0))
    command = [
        sys.executable, "-m", "tallystick_node.cli", "relay", "--rpc", chain.rpc, "--book", str(chain.book),
        "--state", str(folder / "state"), "--host", host, "--key", str(folder / "key.json"),
        "--password-file", str(folder / "password"), *settings,
    ]  # fmt: skip
    process = _start(launch, [*command, "--port", "0"], folder)
    relay = LocalRelay(address, command, folder, launch, process)
    try:
        relay.name = relay.process.wait_for(READY, READY_TIMEOUT_S)
    except BaseException:
        relay.process.stop()
        raise
    return relay


def _start(launch: Launch, command: Sequence[str], folder: Path) -> Process:
    return launch(folder.name, command, folder / f"log.{len(list(folder.glob('log.*')))}")
