"""A manifest that lists other pieces, or more layers, than the chain records is refused by clients and by nodes."""

from __future__ import annotations

import asyncio
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness import samples
from tallystick.network import Network
from tallystick_node.pieces import Pieces
from tallystick_protocol.chain.reads import ModelRecord
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.errors import ManifestError
from tallystick_protocol.signing import keccak
from tallystick_protocol.types import Digest, ModelId

MANIFEST = samples.manifest()
SAID = Digest(MANIFEST.cid.digest)


def recorded(weights: Digest = MANIFEST.weights, layers: int = MANIFEST.layers) -> ModelRecord:
    """A model of this manifest, registered with these words: anybody may register any."""
    return ModelRecord(ModelId(keccak(SAID + weights + layers.to_bytes(32, "big"))), SAID, weights, layers)


async def as_client(record: ModelRecord, folder: Path) -> Any:
    path = folder / "manifest"
    path.write_bytes(MANIFEST.to_bytes())
    chain: Any = SimpleNamespace(
        book=SimpleNamespace(staking_domain=samples.STAKING), node_of=None, locate=None
    )  # fmt: skip
    nobody: Any = SimpleNamespace()
    network = Network(chain, nobody, folder, [])

    async def file(*_: Any) -> Path:
        return path

    network._file = file  # type: ignore[method-assign]
    return await network.manifest(record)


async def as_node(record: ModelRecord, folder: Path) -> Any:
    store = LocalStore(folder / "store")
    store.put_file(BytesIO(MANIFEST.to_bytes()))
    return await Pieces(store, folder / "pieces", []).manifest(record)


@pytest.mark.parametrize("read", [as_client, as_node])
def test_only_what_the_chain_records_is_read(read: Any, tmp_path: Path) -> None:
    assert asyncio.run(read(recorded(), tmp_path)) == MANIFEST
    for number, record in enumerate((recorded(samples.digest("other pieces")), recorded(layers=3))):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(ManifestError, match="not the ones that the chain records"):
            asyncio.run(read(record, folder))
