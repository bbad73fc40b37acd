"""`tallystick calibrate`: real classes as processes of this machine, and a manifest with what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from harness import checkpoints
from tallystick.cli import main
from tallystick.publishing import cut
from tallystick_devnet.demo import default_model
from tallystick_devnet.localnet import LocalNet
from tallystick_model.calibrating import measuring
from tallystick_protocol.content.cid import Cid
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.sketching.accumulating import level
from tallystick_protocol.types import Span

pytestmark = pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="one class only")

TEXT = "The function returns a list of names. If the file does not exist, an error is raised.\n"


def read(store: LocalStore, cid: str, folder: Path) -> Manifest:
    store.read_file(Cid.parse(cid), folder / "manifest", 1 << 20)
    return Manifest.from_bytes((folder / "manifest").read_bytes())


def test_a_model_is_measured_between_real_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two classes only: each takes a process that imports torch."""
    two = tuple(kind for kind in measuring.CLASSES if kind.name in ("as it is", "libraries, AVX2"))
    monkeypatch.setattr(measuring, "CLASSES", two)
    checkpoints.llama(tmp_path / "checkpoint", num_hidden_layers=2)
    store = LocalStore(tmp_path / "store")
    before = cut(tmp_path / "checkpoint", store, "small", "a licence")
    arguments = [
        "calibrate", str(before.cid), "--store", str(store.root), "--lengths", "1", "2", "--texts", "13", "--positions",
        "256", "--plot", str(tmp_path / "plot.svg"), "--no-register", "--json",
    ]  # fmt: skip
    assert main(arguments) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["classes"] == ["as it is", "libraries, AVX2"]
    made = read(store, told["manifest"], tmp_path)
    assert "0x" + made.model_id.hex() == told["model"] != "0x" + before.model_id.hex()
    assert [(one.start, one.end) for one in made.margins] == [(0, 1), (0, 2), (1, 2)]
    assert made.pieces == before.pieces and made.cid in store.pins()
    for span in told["spans"]:
        honest, where = span["honest"], Span(*span["layers"])
        assert 0 < honest["worst"] < span["rare"] < level(before, where).rare, "rounding shows, and less than allowed"
        assert {"int8", "int4", "corrupt_row", "noise"} <= set(span["cheaters"])
        assert all(cheat["windows_to_99"] == 4 for cheat in span["cheaters"].values()), "in fp32 all are far away"
    assert ElementTree.parse(tmp_path / "plot.svg").getroot().tag.endswith("svg")
    assert main([*arguments[:2], "--store", str(store.root), "--lengths", "9", "--no-register"]) == 1
    assert "no spans of 9" in capsys.readouterr().err


@pytest.mark.nightly
def test_the_demo_model_is_calibrated_from_a_text_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with LocalNet(tmp_path) as net:
        _, before = net.publish(default_model(), numerics="bf16w")
        _, keystore = net.client_key()
        local = net.chain
        status = main([
            "--rpc", local.rpc, "--book", str(local.book), "--key", str(keystore),
            "--password-file", str(keystore.parent / "password"), "--source", net.source, "calibrate", str(before.cid),
            "--store", str(tmp_path / "content"), "--text", str(default_model() / "heldout.txt"), "--texts", "8",
            "--lengths", "2", "--plot", str(tmp_path / "plot.svg"), "--json",
        ])  # fmt: skip
        assert status == 0
        told = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert "libraries, AVX2" in told["classes"] and len(told["classes"]) >= 3
        assert bytes.fromhex(told["model"][2:]) in {record.id for record in local.chain().all_models()}
    for span in told["spans"]:
        found = {name: cheat["windows_to_99"] for name, cheat in span["cheaters"].items()}
        assert found["int8"] is not None and found["int8"] <= 16, found
        assert found["corrupt_row"] is not None and found["corrupt_row"] <= 60, found
