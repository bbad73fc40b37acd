"""A network of nodes that speak TLS, one of them without a port, behind a relay that it pays."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.waiting import eventually
from tallystick.client import AsyncClient
from tallystick.generation import Answer
from tallystick_devnet.demo import default_model
from tallystick_devnet.localchain import ETHER
from tallystick_devnet.localnet import PASSWORD, LocalNet, LocalNode, thirds
from tallystick_devnet.localrelay import LocalRelay, start_relay
from tallystick_devnet.processes import start
from tallystick_protocol.keystore import keystore_address
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.signing import Key
from tallystick_protocol.types import ModelId, Wei

PRICE, CREDIT = 10_000, 1 << 20
TOKENS = 24


@dataclass(slots=True)
class Net:
    net: LocalNet
    model: ModelId
    manifest: Manifest
    nodes: list[LocalNode]
    relayed: LocalNode
    relay: LocalRelay
    key: Key


@pytest.fixture(scope="module")
def reachable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    """A node for each span that can be dialled, and one more for the middle that cannot."""
    with LocalNet(tmp_path_factory.mktemp("net"), tls=True) as net:
        model, manifest = net.publish(default_model())
        spans = thirds(manifest.layers)
        net.prepare(4)
        nodes = [net.add_node(model, span) for span in spans]
        terms = ["--price", str(PRICE), "--credit-bytes", str(CREDIT)]
        relay = start_relay(net.chain, net.folder / "relay", PASSWORD, terms, launch=net.launch)
        net.chain.give(keystore_address(net.folder / "node3" / "hot.json"), tokens=Wei(ETHER))
        cheap = ["--host", "none", "--relays", relay.name, "--price", str(10**10)]
        relayed = net.add_node(model, spans[1], settings=cheap)
        key, _ = net.client_key()
        try:
            for node in (*nodes, relayed):
                node.wait()
            yield Net(net, model, manifest, nodes, relayed, relay, key)
        finally:
            relay.process.stop()


@pytest.fixture
async def client(reachable: Net) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(reachable.key, reachable.net.settings()) as made:
        yield made


async def ask(client: AsyncClient, model: ModelId) -> Answer:
    return await client.generate(
        "The function returns", model="0x" + model.hex(), max_tokens=TOKENS, verify="off", ignore_eos=True
    )


def listening_sockets(pid: int) -> int:
    """How many TCP sockets of a process listen."""
    inodes = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                inodes.add(f"socket:[{fields[9]}]")
    held = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            held.add(os.readlink(entry))
    return len(inodes & held)


async def test_a_session_runs_under_tls_and_through_a_relay_to_a_node_without_a_port(
    reachable: Net, client: AsyncClient
) -> None:
    answer = await ask(client, reachable.model)
    assert [hop.node for hop in answer.route] == [
        reachable.nodes[0].address, reachable.relayed.address, reachable.nodes[2].address
    ]  # fmt: skip
    assert all(hop.url.startswith("https://") for hop in answer.route)
    assert answer.route[1].url.endswith(reachable.relay.name.rpartition(":")[2])
    assert listening_sockets(reachable.relayed.process.pid) == 0 < listening_sockets(reachable.nodes[0].process.pid)


async def test_when_the_relay_dies_another_node_takes_over(reachable: Net, client: AsyncClient) -> None:
    undisturbed = await ask(client, reachable.model)
    stream = client.stream(
        "The function returns", model="0x" + reachable.model.hex(), max_tokens=TOKENS, verify="off", ignore_eos=True
    )
    num_events = 0
    async for _ in stream:
        num_events += 1
        if num_events == 8:
            reachable.relay.process.kill()
    assert stream.answer.ids == undisturbed.ids
    replaced = [(lost, why) for lost, _, why in stream.answer.verdict.replaced]
    assert replaced == [(reachable.relayed.address, "unreachable")]


@pytest.mark.nightly
async def test_when_the_relay_is_back_it_is_used_again_and_paid(reachable: Net) -> None:
    await asyncio.to_thread(reachable.relay.process.stop)
    await asyncio.to_thread(reachable.relay.restart)
    log = reachable.relay.process.log
    await eventually("the node at the relay", lambda: f"{reachable.relayed.address} is relayed" in log.read_text(), 60)
    async with AsyncClient(reachable.key, reachable.net.settings()) as client:
        answer = await ask(client, reachable.model)
    assert answer.route[1].node == reachable.relayed.address

    await asyncio.to_thread(reachable.relayed.process.stop)  # the last voucher
    await asyncio.to_thread(reachable.relay.process.stop)  # which is redeemed
    chain = reachable.net.chain.chain()
    earned = await asyncio.to_thread(chain.balance, reachable.relay.address)
    assert 20_000 * PRICE < earned < CREDIT * PRICE, "the last session's bytes, less what is burned"


# -- a machine that can only dial out

HOST, GUEST = "10.213.77.1", "10.213.77.2"


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network namespace with one link to this machine."""
    ip, name = shutil.which("ip"), f"ts{os.getpid()}"
    if ip is None or os.geteuid() != 0:
        pytest.skip("network namespaces take root and iproute2")

    def run(*arguments: str) -> bool:
        return subprocess.run([ip, *arguments], capture_output=True, check=False).returncode == 0

    steps = [
        f"netns add {name}", f"link add {name}a type veth peer name {name}b", f"link set {name}b netns {name}",
        f"addr add {HOST}/30 dev {name}a", f"link set {name}a up", f"-n {name} addr add {GUEST}/30 dev {name}b",
        f"-n {name} link set {name}b up", f"-n {name} link set lo up",
    ]  # fmt: skip
    try:
        if not all(run(*step.split()) for step in steps):
            pytest.skip("this machine makes no network namespaces")
        yield name
    finally:
        run("link", "del", f"{name}a")
        run("netns", "del", name)


@contextlib.asynccontextmanager
async def forwarded(url: str) -> AsyncIterator[str]:
    """A loopback service of this machine as the namespace sees it."""
    port = int(url.rpartition(":")[2])

    async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    sink.write(data)
                    await sink.drain()
            sink.close()

        await asyncio.gather(copy(reader, back), copy(there, writer))

    server = await asyncio.start_server(join, HOST, 0)
    try:
        yield f"http://{HOST}:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@pytest.mark.nightly
async def test_a_node_in_a_namespace_that_can_only_dial_out_serves_the_whole_model(
    reachable: Net, namespace: str, client: AsyncClient
) -> None:
    net = reachable.net
    relay = await asyncio.to_thread(
        start_relay, net.chain, net.folder / "lan relay", PASSWORD, ["--price", "0"], host=HOST, launch=net.launch
    )
    await asyncio.to_thread(net.prepare, 1)
    folder, address = net._prepared.pop(0)
    node = LocalNode(folder.name, address, reachable.manifest.whole, folder, relay.process)
    async with forwarded(net.chain.rpc) as rpc, forwarded(net.source) as source:
        settings = ["--host", "none", "--relays", relay.name, "--price", "1"]
        arguments = [
            {net.chain.rpc: rpc, net.source: source}.get(text, text)
            for text in net.arguments(node, reachable.model, settings)
        ]
        command = ["ip", "netns", "exec", namespace, sys.executable, "-m", "tallystick_node.cli", *arguments]
        node.process = start(node.name, command, folder / "log")
        try:
            await asyncio.to_thread(node.wait)
            assert listening_sockets(node.process.pid) == 0
            answer = await ask(client, reachable.model)
            assert [hop.node for hop in answer.route] == [node.address] and len(answer.ids) == TOKENS
        finally:
            await asyncio.to_thread(node.process.stop)
            await asyncio.to_thread(relay.process.stop)
