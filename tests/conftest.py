"""What many tests share. The running network: importing torch costs seconds a process, so it is started once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tallystick_devnet.demo import default_model
from tallystick_devnet.localnet import LocalNet, LocalNode, thirds
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.signing import Key
from tallystick_protocol.types import Address, ModelId, Span

if TYPE_CHECKING:
    from harness.jury_stage import Trial
    from harness.small_models import Models


@dataclass(slots=True)
class Running:
    """Seven nodes of their own operators: two for the first and the last span, three for the middle one."""

    net: LocalNet
    model: ModelId
    manifest: Manifest
    checkpoint: Path
    nodes: list[LocalNode]
    key: Key
    keystore: Path

    @property
    def id(self) -> str:
        """The model's id as a person writes it: other models may be on the chain, too."""
        return "0x" + self.model.hex()

    @property
    def spans(self) -> list[Span]:
        return thirds(self.manifest.layers)

    def node(self, address: Address) -> LocalNode:
        return next(node for node in self.nodes if node.address == address)

    def revive(self) -> None:
        """Start again what a test has killed, and wait until everything serves."""
        for node in list(self.nodes):
            if not node.process.alive:
                self.net.restart(node, self.model)
        for node in self.nodes:
            node.wait()


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The network; tests that kill nodes call `revive`."""
    with LocalNet(tmp_path_factory.mktemp("net")) as net:
        model, manifest = net.publish(default_model())
        first, middle, last = thirds(manifest.layers)
        net.prepare(7)
        nodes = [net.add_node(model, span) for span in (first, middle, last, first, middle, last, middle)]
        key, keystore = net.client_key()
        for node in nodes:
            node.wait()
        yield Running(net, model, manifest, default_model(), nodes, key, keystore)


@pytest.fixture(scope="module")
def models() -> Iterator[Models]:
    """Small models in this process, for tests that play a network on one event loop."""
    from harness.small_models import small_models  # takes transformers, which most tests do not

    with small_models() as found:
        yield found


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    """A chain and a model for cases in Court."""
    from harness.jury_stage import open_stage

    with open_stage(tmp_path_factory.mktemp("stage")) as opened:
        yield opened


@pytest.fixture
async def trial(stage: Trial, tmp_path: Path) -> AsyncIterator[Trial]:
    """A case's own folder and store on it."""
    from harness.jury_stage import open_trial

    async with open_trial(stage, tmp_path) as opened:
        yield opened
