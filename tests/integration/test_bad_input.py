"""What people get wrong: exit status 1, one sentence that names the cause and the next step, and nothing half done."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from safetensors.torch import load_file, save_file

from conftest import Running
from harness import checkpoints
from tallystick import AsyncClient, cli
from tallystick.publishing import contents, cut, register, serve_content
from tallystick.settings import Settings
from tallystick_devnet.localchain import rich_key
from tallystick_devnet.localnet import PASSWORD, STAKE, LocalNet
from tallystick_node import cli as node_cli
from tallystick_node.config import ENV_PREFIX
from tallystick_node.locks import lock_state
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.content.cid import Cid
from tallystick_protocol.content.gateway import RAW
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.errors import ChainError, ConfigError, ContextLengthExceeded, NoAuditor, NoRoute
from tallystick_protocol.keystore import create_keystore, open_keystore
from tallystick_protocol.manifest import Manifest, Piece
from tallystick_protocol.signing import Key
from tallystick_protocol.types import Address, Wei

TIMEOUT_S = 60
NOBODY = Address("0x000000000000000000000000000000000000dEaD")
LAYERS = 4


class Gateways:
    """HTTP servers in a thread of their own: the commands under test run their own loops."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._runners: list[web.AppRunner] = []

    def store(self, store: LocalStore) -> str:
        """An honest gateway over what a store has pinned."""
        runner, url = self._await(serve_content(store, "127.0.0.1", 0))
        self._runners.append(runner)
        return str(url)

    def answering(self, body: bytes, media_type: str) -> str:
        """A server that has one answer for everything."""

        async def start() -> str:
            async def answer(_: web.Request) -> web.Response:
                return web.Response(body=body, content_type=media_type)

            app = web.Application()
            app.router.add_route("*", "/{path:.*}", answer)
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            self._runners.append(runner)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            host, port = runner.addresses[0]
            return f"http://{host}:{port}"

        return str(self._await(start()))

    def stop(self) -> None:
        for runner in self._runners:
            self._await(runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _await(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)


@dataclass(slots=True)
class World:
    """A chain of its own with two models and no nodes: a good one, and one whose layer 1 is another model's."""

    net: LocalNet
    gateways: Gateways
    good: Manifest
    swapped: Manifest
    folder: Path
    honest: str
    without_a_layer: str
    lying: str
    no_rpc: str


@dataclass(slots=True)
class Operator:
    """Keys, a folder, and the arguments of a node that would serve if nothing were wrong."""

    world: World
    folder: Path
    cold: Key
    hot: Key

    def arguments(self, **changes: str | None) -> list[str]:
        world = self.world
        settings: dict[str, str | None] = {
            "rpc": world.net.chain.rpc,
            "book": str(world.net.chain.book),
            "state": str(self.folder / "state"),
            "model": "0x" + world.good.model_id.hex(),
            "span": "0:2",
            "sources": world.honest,
            "hot_key": str(self.folder / "hot.json"),
            "password_file": str(self.folder / "password"),
            "node": self.cold.address,
        }
        found = ["run"]
        for name, value in {**settings, **changes}.items():
            found += [] if value is None else [f"--{name.replace('_', '-')}", value]
        return found

    def joining(self, **changes: str | None) -> list[str]:
        return [*self.arguments(cold_key=str(self.folder / "cold.json"), **changes), "--join"]

    def has_done_nothing(self) -> bool:
        """Neither staked, nor bound, nor registered."""
        chain = self.world.net.chain.chain()
        record = chain.node(self.cold.address)
        return record.active == 0 and record.span is None and chain.node_of(self.hot.address) is None


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("bad-input")
    gateways = Gateways()
    try:
        with LocalNet(folder / "net") as net:
            store, lacking = LocalStore(folder / "store"), LocalStore(folder / "lacking")
            one = checkpoints.llama(folder / "one")
            good = cut(one, store, "good", None, lambda _: None)
            swapped = replace(
                good,
                name="swapped",
                pieces=tuple(
                    other_weights(piece, store, folder) if piece.name == "layer.1" else piece for piece in good.pieces
                ),
            )
            store.pin(store.put_block(swapped.to_bytes(), swapped.cid.codec))
            for manifest in (good, swapped):
                register(net.chain.chain(), rich_key(), manifest)
            missing = next(piece.cid for piece in good.pieces if piece.name == "layer.2")
            for cid in contents(good):
                if cid != missing:
                    copy(store, lacking, cid, folder)
            yield World(
                net=net,
                gateways=gateways,
                good=good,
                swapped=swapped,
                folder=folder,
                honest=gateways.store(store),
                without_a_layer=gateways.store(lacking),
                lying=gateways.answering(b"not what you asked for", RAW),
                no_rpc=gateways.answering(b"<html>please log in</html>", "text/html"),
            )
    finally:
        gateways.stop()


def other_weights(piece: Piece, store: LocalStore, folder: Path) -> Piece:
    """A piece of the same shape whose numbers are others."""
    path = folder / "other"
    store.read_file(piece.cid, path, 1 << 30)
    tensors = {name: tensor.flip(0).contiguous() for name, tensor in load_file(path).items()}
    save_file(tensors, folder / "flipped")
    cid = store.put_file(folder / "flipped")
    store.pin(cid)
    return replace(piece, cid=cid)


def copy(source: LocalStore, target: LocalStore, cid: Cid, folder: Path) -> None:
    path = folder / "copied"
    source.read_file(cid, path, 1 << 30)
    assert target.put_file(path) == cid
    target.pin(cid)


@pytest.fixture
def operator(world: World, tmp_path: Path) -> Operator:
    (tmp_path / "password").write_text(PASSWORD + "\n")
    (tmp_path / "password").chmod(0o600)
    for name in ("cold", "hot"):
        create_keystore(tmp_path / f"{name}.json", PASSWORD, fast=True)
    cold, hot = (open_keystore(tmp_path / f"{name}.json", PASSWORD) for name in ("cold", "hot"))
    return Operator(world, tmp_path, cold, hot)


@pytest.fixture(autouse=True)
def own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith((ENV_PREFIX, "TALLYSTICK_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


Complaint = Callable[..., str]


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]) -> Complaint:
    """Run a command that must fail: its one sentence. Stops the test run if the command does not end."""

    def run(main: Callable[[list[str]], int], arguments: list[str]) -> str:
        alarm = threading.Timer(TIMEOUT_S, os.kill, (os.getpid(), signal.SIGINT))
        alarm.start()
        capsys.readouterr()
        try:
            status = main(arguments)
        finally:
            alarm.cancel()
        told = capsys.readouterr().err
        assert status == 1, told
        lines = [line for line in told.splitlines() if line.startswith(("tallystick: ", "tallystick-node: "))]
        assert told.splitlines()[-1:] == lines and "Traceback" not in told, told
        sentence = lines[0].partition(": ")[2]
        assert 20 < len(sentence) < 600 and PASSWORD not in sentence
        return sentence

    return run


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def changed_book(world: World, folder: Path, **changes: Any) -> str:
    value = json.loads(world.net.chain.book.read_text())
    (folder / "book.json").write_text(json.dumps({**value, **changes}))
    return str(folder / "book.json")


# -- a node's settings, keys and place

SETTINGS: dict[str, tuple[Callable[[Operator], dict[str, str | None]], str]] = {
    "a span that ends before it begins": (lambda o: {"span": "2:1"}, r"span = '2:1'.*for example 0:3"),
    "a span in words": (lambda o: {"span": "all"}, r"span = 'all'.*for example 0:3"),
    "a span the model does not have": (lambda o: {"span": "2:9"}, r"has layers \[0, 4\), not \[2, 9\)"),
    "an unknown model": (lambda o: {"model": "0x" + "00" * 32}, r"no model 0x0000.*tallystick models"),
    "half a model id": (lambda o: {"model": "0xabcd"}, r"'0xabcd' is not a model id"),
    "a model by name": (lambda o: {"model": "good"}, r"'good' is not a model id"),
    "one of two models": (lambda o: {"model": ""}, r"2 models on chain; say which"),
    "no RPC": (lambda o: {"rpc": f"http://127.0.0.1:{free_port()}"}, r"does not answer.*is the chain running\?"),
    "an RPC that is none": (lambda o: {"rpc": o.world.no_rpc}, r"the RPC at http"),
    "an RPC without a scheme": (lambda o: {"rpc": "localhost"}, r"the RPC at localhost"),
    "no address book": (lambda o: {"book": "/nowhere.json"}, r"no address book at /nowhere.json; start.*or deploy"),
    "an address book of another chain": (
        lambda o: {"book": changed_book(o.world, o.folder, chainId=1)},
        r"is chain 31337, the address book is for 1",
    ),
    "an address book of a chain that was": (
        lambda o: {"book": changed_book(o.world, o.folder, genesis="0x" + "00" * 32)},
        r"started anew since the address book was written; deploy again",
    ),
    "an address book without contracts": (
        lambda o: {"book": changed_book(o.world, o.folder, contracts={})},
        r"book.json is malformed",
    ),
    "every interface": (
        lambda o: {"host": "0.0.0.0"},
        r"host = '0.0.0.0' is every address.*set announce to what others dial",
    ),
    "a public interface": (lambda o: {"host": "192.0.2.1"}, r"port 0 on 192.0.2.1 cannot be used"),
    "a name for a host": (lambda o: {"host": "example.org"}, r"is not an address; use 127.0.0.1"),
    "a port beyond all ports": (lambda o: {"port": "70000"}, r"setting port: .*65535.*config show"),
    "no hot key": (lambda o: {"hot_key": "/nowhere.json"}, r"keystore /nowhere.json cannot be read.*keys new"),
    "a hot key that is a folder": (lambda o: {"hot_key": str(o.folder)}, r"keystore .* cannot be read"),
    "no password file": (lambda o: {"password_file": "/nowhere"}, r"password file /nowhere cannot be read"),
    "no node": (lambda o: {"node": None}, r"node is not set"),
    "a node that is no address": (lambda o: {"node": "0x1234"}, r"setting node: "),
    "a source that is no gateway": (
        lambda o: {"sources": "ipfs://x"},
        r"'ipfs://x' is not a gateway: write it as http",
    ),
    "a price in words": (lambda o: {"price": "cheap"}, r"setting price: "),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_a_wrong_setting_is_named_with_the_remedy(operator: Operator, complaint: Complaint, what: str) -> None:
    changes, sentence = SETTINGS[what]
    assert re.search(sentence, complaint(node_cli.main, operator.arguments(**changes(operator))))
    assert operator.has_done_nothing()


def test_a_port_that_is_taken_is_named(operator: Operator, complaint: Complaint) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        sentence = complaint(node_cli.main, operator.arguments(port=str(port)))
    assert re.search(f"port {port} on 127.0.0.1 cannot be used .*choose another or 0", sentence)


def test_a_wrong_password_is_called_one(operator: Operator, complaint: Complaint) -> None:
    (operator.folder / "password").write_text("not the password\n")
    sentence = complaint(node_cli.main, operator.arguments())
    assert "wrong password" in sentence and "not the password" not in sentence


def test_a_keystore_that_others_can_read_is_refused(operator: Operator, complaint: Complaint) -> None:
    path = operator.folder / "hot.json"
    path.chmod(0o644)
    assert f"chmod 600 {path}" in complaint(node_cli.main, operator.arguments())


def test_a_password_that_others_can_read_is_refused(operator: Operator, complaint: Complaint) -> None:
    path = operator.folder / "password"
    path.chmod(0o640)
    assert f"chmod 600 {path}" in complaint(node_cli.main, operator.arguments())


def test_joining_without_the_cold_key_is_refused(operator: Operator, complaint: Complaint) -> None:
    assert "set cold_key" in complaint(node_cli.main, [*operator.arguments(), "--join"])


def test_a_second_process_with_the_same_folder_is_refused(operator: Operator, complaint: Complaint) -> None:
    with lock_state(operator.folder / "state"):
        sentence = complaint(node_cli.main, operator.arguments())
    assert re.search(r"another tallystick-node runs in .*/state; stop it", sentence)


def test_a_typo_in_the_settings_file_is_named_with_its_line(operator: Operator, complaint: Complaint) -> None:
    path = operator.folder / "node.toml"
    path.write_text('span = "0:2"\npotr = 8080\n')
    sentence = complaint(node_cli.main, [*operator.arguments(), "--config", str(path)])
    assert f"{path}:2: 'potr'" in sentence and "config show" in sentence


def test_a_typo_in_the_environment_is_named(
    operator: Operator, complaint: Complaint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TALLYSTICK_NODE_POTR", "1")
    assert "TALLYSTICK_NODE_POTR" in complaint(node_cli.main, operator.arguments())


def test_a_state_folder_that_cannot_be_made_is_named(operator: Operator, complaint: Complaint) -> None:
    (operator.folder / "file").write_text("")
    sentence = complaint(node_cli.main, operator.arguments(state=str(operator.folder / "file" / "state")))
    assert str(operator.folder / "file") in sentence


@pytest.mark.parametrize("what", ["there already", "a short password"])
def test_a_new_key_that_cannot_be_made_leaves_everything_as_it_was(
    operator: Operator, complaint: Complaint, what: str
) -> None:
    path = operator.folder / ("hot.json" if what == "there already" else "new.json")
    before = path.read_bytes() if path.exists() else None
    if what == "a short password":
        (operator.folder / "password").write_text("short\n")
    complaint(node_cli.main, ["keys", "new", str(path), "--password-file", str(operator.folder / "password")])
    assert (path.read_bytes() if path.exists() else None) == before


# -- pieces


def test_a_piece_that_nobody_has_is_named(operator: Operator, complaint: Complaint) -> None:
    sentence = complaint(node_cli.main, operator.arguments(span="2:4", sources=operator.world.without_a_layer))
    cid = next(piece.cid for piece in operator.world.good.pieces if piece.name == "layer.2")
    assert f"nobody asked holds layer.2: nobody asked holds {cid}" in sentence and "add a source" in sentence
    assert not (operator.folder / "state" / "pieces" / str(cid)).exists()


def test_a_source_that_lies_is_named_and_nothing_of_it_is_kept(operator: Operator, complaint: Complaint) -> None:
    sentence = complaint(node_cli.main, operator.arguments(sources=operator.world.lying))
    assert re.search(r"nobody asked holds the manifest: .* sent wrong bytes", sentence)
    assert not list((operator.folder / "state" / "pieces").iterdir())


def test_a_source_that_lies_is_passed_over_for_one_that_does_not(
    operator: Operator, complaint: Complaint, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = operator.arguments(sources=operator.world.lying)
    sentence = complaint(node_cli.main, [*arguments, "--sources", operator.world.honest])
    assert "hot key is not bound" in sentence, "it came as far as the chain"
    assert any("sent wrong bytes" in record.getMessage() for record in caplog.records), "the lie was told"
    held = LocalStore(operator.folder / "state" / "store")
    assert all(held.has(piece.cid) for piece in operator.world.good.span_pieces(checkpoints.Span(0, 2)))


def test_a_span_with_another_models_weights_does_not_register(operator: Operator, complaint: Complaint) -> None:
    """Every hash is right; the manifest itself names a layer that its canary was not computed with."""
    operator.world.net.chain.give(operator.cold.address, tokens=STAKE)
    arguments = operator.joining(model="0x" + operator.world.swapped.model_id.hex())
    assert "differs from its canary" in complaint(node_cli.main, arguments)
    assert operator.has_done_nothing()


# -- joining


def test_who_is_not_registered_is_told_to_join(operator: Operator, complaint: Complaint) -> None:
    sentence = complaint(node_cli.main, operator.arguments())
    assert f"not bound to node {operator.cold.address}; run: tallystick-node run --join" in sentence


def test_who_is_bound_but_has_no_stake_is_told_to_join(operator: Operator, complaint: Complaint) -> None:
    chain = operator.world.net.chain
    chain.give(operator.cold.address, tokens=Wei(0))
    Wallet(chain.chain(), operator.cold).bind(operator.hot)
    sentence = complaint(node_cli.main, operator.arguments())
    assert "with stake 0" in sentence and "run: tallystick-node run --join" in sentence


def test_who_has_no_tokens_is_told_how_many_are_missing(operator: Operator, complaint: Complaint) -> None:
    operator.world.net.chain.give(operator.cold.address, tokens=Wei(5))
    sentence = complaint(node_cli.main, operator.joining(stake=str(STAKE)))
    assert f"{operator.cold.address} holds 5 token units and needs {STAKE} more" in sentence
    assert operator.has_done_nothing()


def test_a_stake_below_the_minimum_is_refused(operator: Operator, complaint: Complaint) -> None:
    operator.world.net.chain.give(operator.cold.address, tokens=STAKE)
    assert "stake = 1 is below the contract's minimum" in complaint(node_cli.main, operator.joining(stake="1"))
    assert operator.has_done_nothing()


def test_who_has_no_ether_is_told_so(operator: Operator, complaint: Complaint) -> None:
    chain = operator.world.net.chain
    Wallet(chain.chain(), rich_key()).transfer(operator.cold.address, STAKE)
    sentence = complaint(node_cli.main, operator.joining(stake=str(STAKE)))
    assert re.search(r"approving the stake: .*(gas|funds|ether)", sentence, re.IGNORECASE)
    assert operator.has_done_nothing()


def test_a_hot_key_of_another_node_is_refused_before_anything_is_staked(
    operator: Operator, complaint: Complaint
) -> None:
    chain = operator.world.net.chain
    owner = Key(secrets.token_bytes(32))
    chain.give(owner.address, tokens=Wei(0))
    Wallet(chain.chain(), owner).bind(operator.hot)
    assert "is not bound to node" in complaint(node_cli.main, operator.arguments())
    chain.give(operator.cold.address, tokens=STAKE)
    sentence = complaint(node_cli.main, operator.joining(stake=str(STAKE)))
    assert f"belongs to node {owner.address} for ever; make a new one" in sentence
    assert chain.chain().node(operator.cold.address).active == 0, "nothing was staked on the way"


# -- clients


@dataclass(slots=True)
class Customer:
    """A key with money, and the arguments of a client that could ask if anybody served."""

    world: World
    folder: Path

    def arguments(self, *command: str, **changes: str | None) -> list[str]:
        settings: dict[str, str | None] = {
            "rpc": self.world.net.chain.rpc,
            "book": str(self.world.net.chain.book),
            "key": str(self.folder / "hot.json"),
            "password_file": str(self.folder / "password"),
            "source": self.world.honest,
        }
        found = []
        for name, value in {**settings, **changes}.items():
            found += [] if value is None else [f"--{name.replace('_', '-')}", value]
        return [*found, *command]


@pytest.fixture
def customer(operator: Operator) -> Customer:
    return Customer(operator.world, operator.folder)


GENERATE = ("generate", "--model", "good")
QUESTIONS: dict[str, tuple[tuple[str, ...], dict[str, str | None], str]] = {
    "no key": ((*GENERATE, "a"), {"key": None}, r"which key pays\? set --key"),
    "no password": ((*GENERATE, "a"), {"password_file": None}, r"which key pays\?.*--password-file"),
    "a key that is not there": ((*GENERATE, "a"), {"key": "/nowhere"}, r"keystore /nowhere cannot be read"),
    "no RPC": ((*GENERATE, "a"), {"rpc": "http://127.0.0.1:9"}, r"does not answer.*is the chain running\?"),
    "no address book": ((*GENERATE, "a"), {"book": "/nowhere"}, r"no address book at /nowhere"),
    "an empty prompt": ((*GENERATE, ""), {}, r"the prompt is empty"),
    "a prompt that is too long": ((*GENERATE, "word " * 3000), {}, r"good takes 1024 positions; \d+ of the prompt"),
    "more tokens than positions": ((*GENERATE, "a", "--tokens", "100000"), {}, r"good takes 1024 positions"),
    "no tokens": ((*GENERATE, "a", "--tokens", "0"), {}, r"max_tokens=0 is not a positive number"),
    "fewer than no tokens": ((*GENERATE, "a", "--tokens", "-1"), {}, r"max_tokens=-1 is not"),
    "a cold sampler": ((*GENERATE, "a", "--temperature", "-1"), {}, r"temperature -1.0 is not from 0 to 100"),
    "a sampler that is no number": ((*GENERATE, "a", "--temperature", "nan"), {}, r"temperature nan is not"),
    "a top_p of nothing": ((*GENERATE, "a", "--top-p", "0"), {}, r"top_p 0.0 is not above 0"),
    "an unknown model": (("generate", "--model", "nope", "a"), {}, r"0 models match 'nope'.*tallystick models"),
    "two models": (("generate", "a"), {}, r"2 models match ''.*tallystick models"),
    "a model that gives no embeddings": (("embed", "--model", "0x{good}", "a"), {}, r"gives no embeddings; use an enc"),
    "nobody who serves": ((*GENERATE, "a"), {}, r"nobody serves layers \[0, 4\) of 4; .*--span 0:4 --model 0x{good}$"),
    "nobody who has the manifest": ((*GENERATE, "a"), {"source": None}, r"nobody serves this model and no source"),
    "a source that lies": ((*GENERATE, "a"), {"source": "{lying}"}, r"sent wrong bytes"),
    "a source that is none": ((*GENERATE, "a"), {"source": "gopher://a"}, r"is not a gateway"),
    "a checkpoint that is not there": (("publish", "/nowhere", "--no-register"), {}, r"/nowhere"),
    "a folder that is no checkpoint": (("publish", "{folder}", "--no-register"), {}, r"config.json"),
}


@pytest.mark.parametrize("what", QUESTIONS)
def test_a_wrong_question_is_answered_with_the_remedy(customer: Customer, complaint: Complaint, what: str) -> None:
    command, changes, sentence = QUESTIONS[what]
    world = customer.world
    known = {"lying": world.lying, "folder": str(customer.folder), "good": world.good.model_id.hex()}
    arguments = customer.arguments(
        *(word.format(**known) for word in command),
        **{name: value and value.format(**known) for name, value in changes.items()},
    )
    assert re.search(sentence.replace("{good}", known["good"]), complaint(cli.main, arguments))


FUNDING = [
    pytest.param("hello", "1", id="a node that is no address"),
    pytest.param(NOBODY, "0", id="no amount"),
    pytest.param(NOBODY, "-1", id="less than no amount"),
    pytest.param(NOBODY, str(10**30), id="more than there is"),
]


@pytest.mark.parametrize(("node", "amount"), FUNDING)
def test_a_channel_that_cannot_be_funded_is_not(
    customer: Customer, complaint: Complaint, node: str, amount: str
) -> None:
    chain = customer.world.net.chain
    key = open_keystore(customer.folder / "hot.json", PASSWORD)
    chain.give(key.address, tokens=Wei(10**18))
    complaint(cli.main, customer.arguments("fund", "--node", node, "--amount", amount))
    reading = chain.chain()
    assert reading.balance(key.address) == 10**18
    allowed = reading.token.functions.allowance(key.address, reading.escrow.address).call()
    assert allowed == 0, "nothing was approved on the way"


def test_a_content_store_that_cannot_be_served_says_why(customer: Customer, complaint: Complaint) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        store = str(customer.folder / "content")
        sentence = complaint(cli.main, customer.arguments("content", "--store", store, "--port", port))
    assert f"port {port} on 127.0.0.1 cannot be used" in sentence


# -- clients of a network that serves


async def ask(
    running: Running, key: Key, *, banned: set[Address] | None = None, max_cost: int = 10**19, **options: Any
):
    settings: Settings = replace(running.net.settings(), max_cost=Wei(max_cost))
    async with AsyncClient(key, settings) as client:
        client.banned.update(banned or ())
        return await client.generate("The function", max_tokens=4, ignore_eos=True, **options)


def newcomer(running: Running, tokens: int = 0, ether: bool = True) -> Key:
    key = Key(secrets.token_bytes(32))
    if ether:
        running.net.chain.give(key.address, tokens=Wei(tokens))
    elif tokens:
        Wallet(running.net.chain.chain(), rich_key()).transfer(key.address, Wei(tokens))
    return key


async def all_idle(running: Running) -> None:
    """No session stayed open at any node: a question that fails gives everything back."""
    async with AsyncClient(running.key, running.net.settings()) as client:
        async with asyncio.timeout(10):
            for node in running.nodes:
                while (await client._peers.info(node.url))["status"]["sessions"]:
                    await asyncio.sleep(0.05)


async def test_full_verification_without_an_auditor_names_the_span(running: Running) -> None:
    chosen = {node.span: node.address for node in reversed(running.nodes)}
    banned = {node.address for node in running.nodes if node.address not in chosen.values()}
    with pytest.raises(NoAuditor) as caught:
        await ask(running, running.key, banned=banned, verify="full")
    assert any(str(span) in caught.value.message for span in running.spans)
    assert 'verify="audit" or "off"' in caught.value.message
    await all_idle(running)


async def test_layers_that_nobody_serves_are_named_with_the_command_that_would(running: Running) -> None:
    middle = running.spans[1]
    banned = {node.address for node in running.nodes if node.span == middle}
    with pytest.raises(NoRoute) as caught:
        await ask(running, running.key, banned=banned)
    assert f"nobody serves layers {middle}" in caught.value.message
    assert caught.value.message.endswith(f"tallystick-node run --join --span {middle.start}:{middle.end}")


async def test_a_client_without_tokens_is_told_how_many_are_missing(running: Running) -> None:
    key = await asyncio.to_thread(newcomer, running, 7)
    with pytest.raises(ChainError, match=rf"{key.address} holds 7 token units, \d+ are needed"):
        await ask(running, key)
    await all_idle(running)


async def test_a_client_without_ether_is_told_so(running: Running) -> None:
    key = await asyncio.to_thread(newcomer, running, 10**18, ether=False)
    with pytest.raises(ChainError, match=r"(?i)approving the channel: .*(gas|funds|ether)"):
        await ask(running, key)


async def test_a_budget_is_never_exceeded(running: Running) -> None:
    key = await asyncio.to_thread(newcomer, running, 10**19)
    with pytest.raises(ConfigError, match=r"channels need \d+ more token units, this client may spend 1000; raise"):
        await ask(running, key, max_cost=1000)
    chain = running.net.chain.chain()
    assert await asyncio.to_thread(chain.balance, key.address) == 10**19
    await all_idle(running)


async def test_a_prompt_beyond_the_model_is_refused_before_anything_is_funded(running: Running) -> None:
    key = newcomer(running, ether=False)
    with pytest.raises(ContextLengthExceeded, match=str(running.manifest.max_length)):
        async with AsyncClient(key, running.net.settings()) as client:
            async for _ in client.stream([5] * running.manifest.max_length, max_tokens=1):
                raise AssertionError("nothing is generated")


@pytest.mark.parametrize("prompt", [[], [-1], [1 << 40], [True], [1.5], ["a"]])
async def test_ids_that_are_none_are_refused(running: Running, prompt: list[Any]) -> None:
    with pytest.raises(ConfigError, match="the prompt is empty or holds ids beyond the vocabulary"):
        async with AsyncClient(newcomer(running, ether=False), running.net.settings()) as client:
            with contextlib.suppress(StopAsyncIteration):
                await anext(aiter(client.stream(prompt)))
