"""The local network: a chain, a content store with a model, node processes with keys, stake and a span each."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from tallystick.publishing import cut, register, serve_content
from tallystick.routing.candidates import Weights
from tallystick.settings import Settings
from tallystick_devnet.localchain import ETHER, LocalChain, rich_key, start_chain
from tallystick_devnet.nursery import Nursery
from tallystick_devnet.processes import Process, stop_all
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.errors import ConfigError
from tallystick_protocol.keystore import create_keystore, open_keystore
from tallystick_protocol.manifest import Manifest, Numerics
from tallystick_protocol.signing import Key
from tallystick_protocol.types import Address, ModelId, Span, Wei

PASSWORD = "only for the local network"
STAKE = Wei(2000 * ETHER)
CLIENT_TOKENS = Wei(10_000 * ETHER)
NODE_COMMAND = (sys.executable, "-m", "tallystick_node.cli")
READY_TIMEOUT_S = 120.0
_ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
"""Many nodes on few cores."""

LEASE_S = "3"
"""Everybody is on this machine: who is away for longer than that does not come back."""

READY = r"serving at (https?://\S+)"


@dataclass(slots=True)
class LocalNode:
    """One node process, with keys of its own."""

    name: str
    address: Address
    span: Span
    folder: Path
    process: Process
    url: str = ""

    def wait(self) -> None:
        """Until it serves. Raises ProcessFailed."""
        self.url = self.process.wait_for(READY, READY_TIMEOUT_S)


class LocalNet:
    """Use as a context manager: everything it has started is stopped at the end."""

    def __init__(
        self, folder: Path, say: Callable[[str], None] = lambda _: None, rpc_port: int = 0, tls: bool = False,
        stake: Wei = STAKE,
    ) -> None:
        """tls: nodes speak TLS as they would beyond this machine. stake: of each node."""
        self._stake = stake
        self.folder = folder
        self._say = say
        self._rpc_port = rpc_port
        self._tls = tls
        self._store = LocalStore(folder / "content")
        self._content = _ContentThread(self._store)
        self._nursery = Nursery(folder / "nursery.log")
        self.nodes: list[LocalNode] = []
        self._num_nodes = 0
        self._prepared: list[tuple[Path, Address]] = []
        self.local: LocalChain | None = None

    def __enter__(self) -> LocalNet:
        try:
            self.local = start_chain(self.folder, self._rpc_port)
            self._say(f"chain at {self.local.rpc}, contracts deployed")
            self._content.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        stop_all([node.process for node in self.nodes])
        self._nursery.close()
        self._content.stop()
        if self.local is not None:
            self.local.process.stop()

    @property
    def chain(self) -> LocalChain:
        assert self.local is not None, "the network is not started"
        return self.local

    @property
    def source(self) -> str:
        """The base URL of the content store."""
        return self._content.url

    def publish(
        self,
        checkpoint: Path,
        name: str | None = None,
        *,
        numerics: Numerics = "fp32",
        quantize: Literal["int8", "int4"] | None = None,
    ) -> tuple[ModelId, Manifest]:
        """Cut a checkpoint into pieces, put them into the content store, record the model on chain."""
        manifest = cut(checkpoint, self._store, name, _licence(checkpoint), numerics=numerics, quantize=quantize)
        model = register(self.chain.chain(), rich_key(), manifest)
        self._say(f"published {manifest.name}: {manifest.layers} layers, manifest {manifest.cid}")
        return model, manifest

    def prepare(self, count: int) -> None:
        """Keys, ether and tokens for nodes that are to be added: all in one go, for a block takes a second."""
        fresh = []
        for _ in range(count):
            folder = self.folder / f"node{self._num_nodes}"
            self._num_nodes += 1
            folder.mkdir(parents=True)
            _write_password(folder)
            cold = create_keystore(folder / "cold.json", PASSWORD, fast=True)
            create_keystore(folder / "hot.json", PASSWORD, fast=True)
            fresh.append((folder, cold))
        self.chain.give(*(cold for _, cold in fresh), tokens=self._stake)
        self._prepared += fresh

    def add_node(
        self, model: ModelId, span: Span, command: Sequence[str] = NODE_COMMAND, settings: Sequence[str] = ()
    ) -> LocalNode:
        """Start a node that joins with keys of its own; wait for it with `node.wait()`."""
        if not self._prepared:
            self.prepare(1)
        folder, cold = self._prepared.pop(0)
        return self._start(LocalNode(folder.name, cold, span, folder, None), model, command, settings)  # type: ignore[arg-type]

    def launch(self, name: str, command: Sequence[str], log: Path) -> Process:
        """A Python process that need not import everything anew, as the nodes' are."""
        return self._nursery.start(name, command, log, _ENVIRONMENT)

    def restart(
        self, node: LocalNode, model: ModelId, command: Sequence[str] = NODE_COMMAND, settings: Sequence[str] = ()
    ) -> None:
        """Start a node's process again, with the keys and the state it had."""
        self.nodes.remove(node)
        self._start(node, model, command, settings)

    def client_key(self, name: str = "client") -> tuple[Key, Path]:
        """A new key with ether and tokens, and its keystore."""
        path = self.folder / name / "key.json"
        address = create_keystore(path, PASSWORD, fast=True)
        _write_password(path.parent)
        self.chain.give(address, tokens=CLIENT_TOKENS)
        return open_keystore(path, PASSWORD), path

    def settings(self) -> Settings:
        """What a client of this network needs to know; all nodes are near, so it goes by the price."""
        return Settings(
            rpc=self.chain.rpc,
            book=self.chain.book,
            cache=self.folder / "cache",
            sources=[self.source],
            weights=Weights(seconds_per_wei=1e-9),
        )

    def arguments(self, node: LocalNode, model: ModelId, settings: Sequence[str] = ()) -> list[str]:
        """What `tallystick-node` is called with for a node of this network."""
        return [
            "run", "--join",
            "--rpc", self.chain.rpc, "--book", str(self.chain.book), "--state", str(node.folder / "state"),
            "--model", "0x" + model.hex(), "--span", f"{node.span.start}:{node.span.end}", "--sources", self.source,
            "--hot-key", str(node.folder / "hot.json"), "--cold-key", str(node.folder / "cold.json"),
            "--password-file", str(node.folder / "password"), "--stake", str(self._stake), "--redeem-after-s", "3600",
            "--lease-s", LEASE_S, "--threads", "1", *(["--tls", "on"] if self._tls else []), *settings,
        ]  # fmt: skip

    def _start(self, node: LocalNode, model: ModelId, command: Sequence[str], settings: Sequence[str]) -> LocalNode:
        arguments = [*command, *self.arguments(node, model, settings)]
        log = node.folder / f"log.{len(list(node.folder.glob('log.*')))}"
        node.process = self._nursery.start(node.name, arguments, log, _ENVIRONMENT)
        self.nodes.append(node)
        return node


class _ContentThread:
    """The content store's gateway, served by a thread of this process."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="content", daemon=True)
        self._runner: object | None = None
        self.url = ""

    def start(self) -> None:
        self._thread.start()
        serving = serve_content(self._store, "127.0.0.1", 0)
        self._runner, self.url = asyncio.run_coroutine_threadsafe(serving, self._loop).result(30)

    def stop(self) -> None:
        if not self._thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(30)  # type: ignore[union-attr]
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)


def _write_password(folder: Path) -> None:
    path = folder / "password"
    path.touch(mode=0o600)
    path.write_text(PASSWORD + "\n")


def _licence(checkpoint: Path) -> str | None:
    """A checkpoint that states no licence may be tried out here; `tallystick publish` asks for one."""
    stated = any((checkpoint / name).exists() for name in ("LICENSE", "LICENSE.txt", "README.md"))
    return None if stated else "not stated; for a local network only"


def thirds(layers: int) -> list[Span]:
    """Three spans of nearly equal length. Raises ConfigError for fewer than three layers."""
    if layers < 3:
        raise ConfigError(f"{layers} layers do not make three spans")
    return parts(Span(0, layers), 3)


def spread(manifest: Manifest) -> list[Span]:
    """Spans that cover a model: three of one stack, two of each of two; a layer each where there are fewer."""
    if manifest.encoder_layers == 0:
        return parts(manifest.whole, 3)
    cut = manifest.encoder_layers
    return parts(Span(0, cut), 2) + parts(Span(cut, manifest.layers), 2)


def parts(stack: Span, count: int) -> list[Span]:
    """`count` spans of nearly equal length that cover a stack; one for each layer where it has fewer."""
    count = min(count, len(stack))
    cuts = [stack.start + len(stack) * index // count for index in range(count + 1)]
    return [Span(start, end) for start, end in pairwise(cuts)]
