"""A relay of one's own, for nodes of the local network that shall have no port."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tallystick_devnet.localchain import LocalChain
from tallystick_devnet.processes import Process, start
from tallystick_protocol.keystore import create_keystore
from tallystick_protocol.types import Address, Wei

READY_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class LocalRelay:
    """name: what nodes have in their setting `relays`."""

    address: Address
    name: str
    process: Process


def start_relay(chain: LocalChain, folder: Path, password: str, settings: Sequence[str] = ()) -> LocalRelay:
    """Start a relay on 127.0.0.1 with a key of its own, and wait until it serves. Raises ProcessFailed."""
    folder.mkdir(parents=True)
    (folder / "password").touch(mode=0o600)
    (folder / "password").write_text(password + "\n")
    address = create_keystore(folder / "key.json", password, fast=True)
    chain.give(address, tokens=Wei(0))
    command = [
        sys.executable, "-m", "tallystick_node.cli", "relay", "--rpc", chain.rpc, "--book", str(chain.book),
        "--state", str(folder / "state"), "--host", "127.0.0.1", "--port", "0", "--key", str(folder / "key.json"),
        "--password-file", str(folder / "password"), *settings,
    ]  # fmt: skip
    process = start(folder.name, command, folder / "log")
    try:
        return LocalRelay(address, process.wait_for(r"relaying as (\S+)", READY_TIMEOUT_S), process)
    except BaseException:
        process.stop()
        raise
