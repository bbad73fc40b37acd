"""The network that is measured: groups of nodes on loopback, some behind delayable wires, and clients that ask them."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from tallystick.client import AsyncClient
from tallystick.payments import Purse
from tallystick.session.remote import Remote
from tallystick.settings import AUDIT_PROBABILITY
from tallystick_devnet.bench.accounts import Account
from tallystick_devnet.bench.wires import Wires
from tallystick_devnet.localchain import ETHER
from tallystick_devnet.localnet import LocalNet, LocalNode
from tallystick_devnet.processes import ProcessFailed
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.errors import TallystickError
from tallystick_protocol.manifest import Manifest, Numerics
from tallystick_protocol.signing import Key
from tallystick_protocol.types import Address, ModelId, Span, Wei

SAMPLED_NODE = (sys.executable, "-m", "tallystick_devnet.bench.sampled_node")
PRICE = Wei(10**12)
REST_S = 0.03
"""CPU seconds of a second that a node takes which nobody asks for anything."""

CHANNEL = Wei(100 * ETHER)
"""In each node's channel before anything is measured: a client that must fund first waits for a block."""


HOPS, OTHERS = "0x" + "11" * 20, "0x" + "22" * 20
"""Operators. There are but two: where three offer a layer, a client does not wait for those that answer late, and here
it is confined to some of the nodes, perhaps the late ones."""


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes that split the model into equal spans. wired: behind a delayable wire each, and under TLS."""

    spans: int
    price: Wei = PRICE
    operator: str = HOPS
    wired: bool = False


GROUPS = {
    "free1": Group(1, Wei(0)),
    "free2": Group(2, Wei(0)),
    "free4": Group(4, Wei(0)),
    "paid1": Group(1),
    "paid2": Group(2),
    "paid4": Group(4),
    "wired4": Group(4, Wei(2 * PRICE), OTHERS, wired=True),
    "auditor": Group(1, Wei(2 * PRICE), OTHERS),
}
"""By name. The dearer ones are in no route that has others to choose from: they audit, and stand in."""


@dataclass(slots=True)
class BenchNet:
    """Nodes by group, first layers first, and a client's key."""

    net: LocalNet
    wires: Wires
    model: ModelId
    manifest: Manifest
    key: Key
    groups: dict[str, list[LocalNode]]
    settings: dict[str, list[str]]

    @property
    def id(self) -> str:
        return "0x" + self.model.hex()

    @property
    def nodes(self) -> list[LocalNode]:
        return [node for group in self.groups.values() for node in group]

    def client(self, *groups: str, audits: bool = False) -> AsyncClient:
        """A client that uses the nodes of these groups and no others. audits: as often as clients do by themselves."""
        chance = AUDIT_PROBABILITY if audits else 0.0
        client = AsyncClient(self.key, replace(self.net.settings(), audit_probability=chance))
        allowed = {node.address for name in groups for node in self.groups[name]}
        client.banned.update({node.address for node in self.nodes} - allowed)
        return client

    def by_address(self, address: Address) -> LocalNode:
        return next(node for node in self.nodes if node.address == address)

    def revive(self, node: LocalNode) -> None:
        """Start a killed node again, at the same port."""
        self.net.restart(node, self.model, SAMPLED_NODE, self.settings[node.name])
        node.wait()

    def passed(self) -> list[list[int]]:
        """Bytes to and from each wired node since the last time."""
        return self.wires.count()

    def begin_account(self, node: LocalNode) -> None:
        """From now on the node looks where its time goes."""
        _ask(node)

    def account(self, node: LocalNode) -> Account:
        """What the node has done since `begin_account`."""
        return Account.from_json(_ask(node))


def _ask(node: LocalNode, timeout_s: float = 30.0) -> str:
    path = node.folder / "account.json"
    path.unlink(missing_ok=True)
    os.kill(node.process.pid, signal.SIGUSR1)
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > deadline:
            raise TallystickError(f"{node.name} gave no account of its time within {timeout_s:g} s")
        time.sleep(0.01)
    return path.read_text()


@contextmanager
def bench_net(
    folder: Path, checkpoint: Path, groups: Collection[str], threads: int, numerics: Numerics, tls: bool
) -> Iterator[BenchNet]:
    """Start the nodes of these groups. tls: all of them speak it, not only those behind wires."""
    wanted = [(name, span) for name in groups for span in range(GROUPS[name].spans)]
    ports = dict(zip(wanted, _free_ports(len(wanted)), strict=True))
    wired = [port for (name, _), port in ports.items() if GROUPS[name].wired]
    with LocalNet(folder, tls=tls) as net, Wires(wired) as wires, no_vouchers_over_nothing():
        model, manifest = net.publish(checkpoint, numerics=numerics)
        net.prepare(len(wanted))
        found: dict[str, list[LocalNode]] = {name: [] for name in groups}
        given: dict[str, list[str]] = {}
        for (name, at), port in ports.items():
            group = GROUPS[name]
            settings = [
                "--port", str(port), "--threads", str(threads), "--price", str(group.price),
                "--operator", group.operator, "--max-length", str(min(manifest.max_length, 8192)),
                *(["--announce", f"127.0.0.1:{wires.ports[port]}"] if group.wired else []),
            ]  # fmt: skip
            span = equal_spans(manifest.layers, group.spans)[at]
            found[name].append(net.add_node(model, span, SAMPLED_NODE, settings))
            given[found[name][-1].name] = settings
        key, _ = net.client_key()
        bench = BenchNet(net, wires, model, manifest, key, found, given)
        for node in bench.nodes:
            node.wait()
        Wallet(net.chain.chain(), key).fund(key.address, [(node.address, CHANNEL) for node in bench.nodes])
        wait_for_rest([node.process.pid for node in bench.nodes])
        yield bench


def wait_for_rest(pids: Sequence[int], timeout_s: float = 180.0) -> None:
    """Return when these processes have nothing to do any more: nodes that have begun to serve still write plans.

    Raises ProcessFailed where that takes too long: what is measured beside it would say little.
    """
    deadline, before, resting = time.monotonic() + timeout_s, _cpu_s(pids), 0
    while resting < 3 and time.monotonic() < deadline:
        time.sleep(1)
        now = _cpu_s(pids)
        resting = resting + 1 if now - before <= REST_S * len(pids) else 0
        before = now
    if resting < 3:
        raise ProcessFailed(f"the nodes do not come to rest within {timeout_s:g} s")


def _cpu_s(pids: Sequence[int]) -> float:
    fields = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids)
    return sum(int(one[11]) + int(one[12]) for one in fields) / os.sysconf("SC_CLK_TCK")


@contextmanager
def no_vouchers_over_nothing() -> Iterator[None]:
    """Nodes that ask for nothing are sent no vouchers, so that what paying takes can be told."""
    pay = Remote.pay

    async def pay_if_due(remote: Remote, rows: int, purse: Purse) -> None:
        if remote.candidate.offer.price:
            await pay(remote, rows, purse)
        else:
            remote.rows_paid = max(remote.rows_paid, rows)

    Remote.pay = pay_if_due  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Remote.pay = pay  # type: ignore[method-assign]


def equal_spans(layers: int, count: int) -> list[Span]:
    """The layers in so many parts of nearly equal size."""
    edges = [round(layers * part / count) for part in range(count + 1)]
    return [Span(start, end) for start, end in pairwise(edges)]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for sock in sockets:
        sock.bind(("127.0.0.1", 0))
    ports = [int(sock.getsockname()[1]) for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports
