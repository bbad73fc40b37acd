"""`tallystick publish` and `models` on a real chain: stopped by Ctrl-C, gone on with, registered, listed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from harness import checkpoints
from tallystick.cli import main
from tallystick.publishing import register
from tallystick_devnet.localchain import LocalChain, rich_key, start_chain
from tallystick_model.publishing.pieces import PieceReader
from tallystick_protocol.content.cid import Cid
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.keystore import create_keystore
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.types import Address, ModelId, Wei

EVIL = "evil [/x] [bold]name"
LAYERS = 6


@dataclass(frozen=True)
class Publisher:
    """Somebody with a key, a store and a checkpoint of many layers."""

    chain: LocalChain
    key: Address
    folder: Path

    def command(self, *arguments: str) -> list[str]:
        local, keys = self.chain, self.folder / "keys"
        return [
            "--rpc", local.rpc, "--book", str(local.book), "--key", str(keys / "key.json"),
            "--password-file", str(keys / "password"), *arguments,
        ]  # fmt: skip

    @property
    def publish(self) -> list[str]:
        store = str(self.folder / "store")
        return self.command("publish", str(self.folder / "checkpoint"), "--store", store, "--name", EVIL)

    @property
    def notes(self) -> list[Path]:
        return list((self.folder / "store" / "publishing").glob("*/pieces.jsonl"))


@pytest.fixture(scope="module")
def publisher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Publisher]:
    folder = tmp_path_factory.mktemp("publisher")
    checkpoints.llama(folder / "checkpoint", num_hidden_layers=LAYERS)
    chain = start_chain(folder)
    try:
        address = create_keystore(folder / "keys" / "key.json", "only for tests", fast=True)
        (folder / "keys" / "password").write_text("only for tests\n")
        (folder / "keys" / "password").chmod(0o600)
        yield Publisher(chain, address, folder)
    finally:
        chain.process.stop()


def test_a_key_without_means_is_told_before_anything_is_written(
    publisher: Publisher, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(publisher.publish) == 1
    assert "to pay gas with" in capsys.readouterr().err
    assert not (publisher.folder / "store").exists()


def test_ctrl_c_stops_it_and_the_same_command_goes_on(
    publisher: Publisher, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher.chain.give(publisher.key, tokens=Wei(0))
    process = subprocess.Popen(
        [sys.executable, "-m", "tallystick.cli", *publisher.publish],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not any(note.stat().st_size for note in publisher.notes):  # it is there a moment before its first line is
        assert process.poll() is None and time.monotonic() < deadline, "waited 60 s for the first piece"
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert time.monotonic() - begun < 5, "about a second, on a machine that does nothing else"
    assert "the same command, run again, goes on from here" in said and "Traceback" not in said
    assert publisher.notes
    written: list[object] = []
    put_file = LocalStore.put_file
    monkeypatch.setattr(LocalStore, "put_file", lambda store, source: written.append(source) or put_file(store, source))
    assert main(publisher.publish) == 0
    pieces = [source.piece for source in written if isinstance(source, PieceReader)]
    assert len(pieces) < LAYERS + 2, "a piece that is noted is not written again"
    assert not publisher.notes
    told = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    record = publisher.chain.chain().model(ModelId(bytes.fromhex(told["model"][2:])))
    assert (record.manifest, record.layers) == (Cid.parse(told["manifest"]).digest, LAYERS)


def test_models_are_listed_with_what_their_manifests_say(
    publisher: Publisher, capsys: pytest.CaptureFixture[str]
) -> None:
    store = LocalStore(publisher.folder / "store")
    chain = publisher.chain.chain()
    (record,) = chain.all_models()
    manifest = next(
        found for cid in store.pins() if cid.digest == record.manifest
        for found in [Manifest.from_bytes(store.get_block(cid))]
    )  # fmt: skip
    unknown = replace(manifest, name="nobody has it")
    register(chain, rich_key(), unknown)
    listed = publisher.command("models", "--store", str(store.root))
    assert main([*listed, "--json"]) == 0
    known, lost = json.loads(capsys.readouterr().out)
    size = sum(piece.bytes for piece in manifest.pieces)
    assert (known["name"], known["bytes"], known["licence"], known["layers"]) == (EVIL, size, "cc0-1.0", LAYERS)
    assert (lost["id"], lost["layers"], "name" in lost) == ("0x" + unknown.model_id.hex(), LAYERS, False)
    assert main(listed) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = f"  {EVIL}: text-generation, {LAYERS} layers, fp32, F32 weights, {size / 1e6:.1f} MB, cc0-1.0"
    assert lines[:3] == ["0x" + manifest.model_id.hex(), expected, f"  manifest {manifest.cid}"]
    assert lines[3:] == ["0x" + unknown.model_id.hex(), lines[4], f"  manifest {unknown.cid}"]
    assert "its manifest is not found" in lines[4]
