"""Jail and beat on a chain of its own: what a node does by itself, what anybody does to a dead one, who is left out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from web3.types import RPCEndpoint

from harness.bench_court import THOUSAND, CourtBench, key
from tallystick_devnet.demo import default_model
from tallystick_devnet.localchain import rich_key, start_chain
from tallystick_devnet.localnet import NODE_COMMAND, READY, LocalNet
from tallystick_devnet.localnet import PASSWORD as NET_PASSWORD
from tallystick_node import cli
from tallystick_node.heartbeat import Heartbeat
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.errors import ChainError
from tallystick_protocol.keystore import create_keystore, open_keystore
from tallystick_protocol.signing import keccak
from tallystick_protocol.types import Digest, Span, Wei

DAY = 86_400
PASSWORD = "a long password"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CourtBench]:
    """The accused node has served for a day; nobody has beaten."""
    local = start_chain(tmp_path_factory.mktemp("heartbeat"))
    try:
        bench = CourtBench(local, Digest(keccak(b"manifest")), Digest(keccak(b"weights")), 4)
        local.give(bench.hot.address, tokens=Wei(0))
        yield bench
    finally:
        local.process.stop()


@pytest.fixture(autouse=True)
def undone(bench: CourtBench) -> Iterator[None]:
    snapshot = bench.rpc("evm_snapshot")
    yield
    bench.rpc("evm_revert", snapshot)


@pytest.fixture
def node(bench: CourtBench) -> Heartbeat:
    """The accused node's, with its hot key."""
    return Heartbeat(Wallet(bench.local.chain(), bench.hot), bench.accused.address)


def transactions(bench: CourtBench) -> int:
    return int(bench.local.chain().web3.eth.get_transaction_count(bench.hot.address))


def test_a_beat_is_sent_when_it_is_due_and_not_before(bench: CourtBench, node: Heartbeat) -> None:
    chain = bench.local.chain()
    assert node.seen_at is None
    node.look()
    first = node.seen_at
    assert first == chain.node(bench.accused.address).seen_at and first >= chain.now() - 2
    assert transactions(bench) == 1
    # Another process, as after a restart, knows it from the chain.
    again = Heartbeat(Wallet(chain, bench.hot), bench.accused.address)
    assert 0 < again.look() <= 1800
    bench.wait(DAY - 60)
    assert 1 <= again.look() <= 60
    assert transactions(bench) == 1 and again.seen_at == first
    bench.wait(60)
    again.look()
    assert transactions(bench) == 2 and again.seen_at is not None and again.seen_at >= first + DAY


def test_only_a_node_that_serves_beats_and_a_broken_chain_ends_nothing(bench: CourtBench, node: Heartbeat) -> None:
    failures = [ChainError("no gas")]
    looks = asyncio.Event()
    asked = 0

    def look() -> float:
        nonlocal asked
        asked += 1
        if failures:
            raise failures.pop()
        loop.call_soon_threadsafe(looks.set)
        return 1.0

    def serves() -> bool:
        nonlocal rounds
        rounds += 1
        return rounds > 2

    async def run() -> None:
        task = asyncio.create_task(beating.run(serves))
        await asyncio.wait_for(looks.wait(), 30)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    rounds, beating = 0, Heartbeat(Wallet(bench.local.chain(), bench.hot), bench.accused.address, pause_s=0.01)
    beating.look = look  # type: ignore[method-assign]
    loop = asyncio.new_event_loop()
    loop.run_until_complete(run())
    loop.close()
    assert asked == 2 and rounds >= 4


def test_a_dead_node_is_jailed_and_left_out_until_it_beats(bench: CourtBench, node: Heartbeat) -> None:
    chain, dead = bench.local.chain(), bench.accused.address
    before = {serving.record.node for serving in chain.serving(bench.model)}
    with pytest.raises(ChainError, match="NotReady"):
        bench.accuser.jail(dead)
    bench.wait(DAY)
    bench.accuser.jail(dead)
    record = chain.node(dead)
    assert record.jailed and record.active == 10 * THOUSAND, "nothing is slashed"
    serving = chain.serving(bench.model)
    assert {one.record.node for one in serving} == before - {dead}
    assert sum(one.record.active for one in serving) == chain.weight(bench.model), "a client's sum is the contract's"
    bench.wait(DAY)
    assert bench.docket.units(dead, chain.now()) == 0, "out of sortition"
    node.leave_jail()
    assert not chain.node(dead).jailed and node.seen_at == chain.node(dead).seen_at
    sent = transactions(bench)
    node.leave_jail()
    assert transactions(bench) == sent, "once is enough"
    assert {one.record.node for one in chain.serving(bench.model)} == before
    assert sum(one.record.active for one in chain.serving(bench.model)) == chain.weight(bench.model)


def test_a_look_frees_from_jail_too(bench: CourtBench, node: Heartbeat) -> None:
    bench.wait(2 * DAY)
    bench.accuser.jail(bench.accused.address)
    node.look()
    assert not bench.local.chain().node(bench.accused.address).jailed


def test_the_command_jails_and_says_why_not(
    bench: CourtBench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "password").write_text(PASSWORD)
    (tmp_path / "password").chmod(0o600)
    create_keystore(tmp_path / "key", PASSWORD, key(902).secret, fast=True)

    def jail(whom: str) -> tuple[int, str]:
        settings = {"rpc": bench.local.rpc, "book": bench.local.book, "hot-key": tmp_path / "key"}
        flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
        status = cli.main(["jail", whom, *flags, "--password-file", str(tmp_path / "password")])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    dead = bench.accused.address
    status, said = jail(dead)
    assert status == 1 and "only after 172800 s of silence" in said
    assert jail("0x12")[0] == 1
    status, said = jail(bench.accuser.address)
    assert status == 1 and "serves nothing" in said
    bench.wait(DAY)
    status, said = jail(dead)
    assert status == 0 and f"{dead} is in jail until it beats" in said
    assert bench.local.chain().node(dead).jailed
    status, said = jail(dead)
    assert status == 1 and "in jail already" in said


@pytest.mark.nightly
def test_a_node_that_is_started_in_jail_beats_before_it_serves(tmp_path: Path) -> None:
    """With its hot key alone, as after two days in which its machine was off."""
    with LocalNet(tmp_path) as net:
        model, manifest = net.publish(default_model())
        node = net.add_node(model, Span(0, manifest.layers))
        node.wait()
        node.process.stop()
        chain = net.chain.chain()
        for method, parameters in (("evm_increaseTime", [2 * DAY]), ("evm_mine", [])):
            chain.web3.provider.make_request(RPCEndpoint(method), parameters)
        Wallet(chain, rich_key()).jail(node.address)
        assert not chain.serving(model)
        net.chain.give(open_keystore(node.folder / "hot.json", NET_PASSWORD).address, tokens=Wei(0))
        arguments = [one for one in net.arguments(node, model, ["--node", node.address]) if one != "--join"]
        back = net.launch("back", [*NODE_COMMAND, *arguments], tmp_path / "back.log")
        back.wait_for(READY, 60)
        assert [one.record.node for one in chain.serving(model)] == [node.address]
        assert chain.node(node.address).seen_at >= chain.now() - 60
        back.stop()
