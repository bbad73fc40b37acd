"""`tallystick verify-model` and `publish` from the command line: what is sound, what is spoiled, what is told."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from harness import checkpoints
from harness.checkpoints import Published, published
from tallystick.cli import main, nodes_table
from tallystick.inspection import verify_model
from tallystick.piece_files import check_piece_file
from tallystick.progress import ProgressBar, told
from tallystick.publishing import contents, serve_content
from tallystick_model.publishing.progress import Progress
from tallystick_protocol.content.cid import Cid, Codec
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.errors import ConfigError, ManifestError
from tallystick_protocol.keystore import create_keystore
from tallystick_protocol.manifest import Manifest


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Published:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model")
    return published(checkpoints.llama(folder / "checkpoint", num_hidden_layers=2), folder)


@pytest.fixture
def copy(served: Published, tmp_path: Path) -> LocalStore:
    """A store of one's own with the model in it."""
    store = LocalStore(tmp_path / "store")
    for cid in contents(served.manifest):
        served.store.read_file(cid, tmp_path / "passing", 1 << 30)
        store.put_file((tmp_path / "passing").open("rb"))
        (tmp_path / "passing").unlink()
    return store


async def test_a_sound_model_is_told_in_full(served: Published) -> None:
    report = await verify_model(str(served.manifest.cid), served.store.root, [], deep=True)
    assert report.sound, report.lines()
    whats = {check.what for check in report.checks}
    assert {"manifest", "embed", "layer.0", "layer.1", "head", "canary over layer 1", "config and tensors"} <= whats
    assert report.bytes == sum(piece.bytes for piece in served.manifest.pieces)


async def test_a_piece_that_is_gone_or_damaged_is_named(served: Published, copy: LocalStore) -> None:
    layer, head = served.manifest.pieces[1], served.manifest.pieces[-1]
    whole = copy.root / "files" / str(layer.cid)
    loose = copy.root / "blocks" / str(layer.cid)[-2:] / str(layer.cid)
    path = whole if whole.exists() else loose
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    for gone in ((copy.root / "files" / str(head.cid)), copy.root / "blocks" / str(head.cid)[-2:] / str(head.cid)):
        gone.unlink(missing_ok=True)
    report = await verify_model(str(served.manifest.cid), copy.root, [], deep=True)
    assert not report.sound
    assert {check.what for check in report.checks if not check.ok} >= {layer.name, head.name}


async def test_a_manifest_with_another_layers_piece_is_caught_by_its_canary(
    served: Published, copy: LocalStore
) -> None:
    embed, first, second, *rest = served.manifest.pieces
    names = sorted(second.tensors)
    path = copy.root.parent / "file"
    copy.read_file(second.cid, path, second.bytes)
    renamed = path.read_bytes().replace(b"model.layers.1.", b"model.layers.0.")
    assert len(names) == len(first.tensors)
    (copy.root.parent / "renamed").write_bytes(renamed)
    forged = replace(first, cid=copy.put_file(copy.root.parent / "renamed"), bytes=len(renamed))
    manifest: Manifest = replace(served.manifest, pieces=(embed, forged, second, *rest))
    copy.put_block(manifest.to_bytes(), Codec.RAW)
    report = await verify_model(str(manifest.cid), copy.root, [], deep=True)
    assert [check.what for check in report.checks if not check.ok] == ["canary over layer 0"]
    shallow = await verify_model(str(manifest.cid), copy.root, [])
    assert shallow.sound  # its bytes are what that manifest says


async def test_what_is_no_model_is_refused_in_words(served: Published, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not the CID"):
        await verify_model("nonsense", served.store.root, [])
    tokenizer = served.manifest.tokenizer["tokenizer.json"].cid
    assert not (await verify_model(str(tokenizer), served.store.root, [])).sound
    missing = await verify_model(str(Cid.of_raw(b"gone")), tmp_path / "nowhere", [])
    assert not missing.sound
    assert "nobody asked" in missing.checks[0].detail


@pytest.mark.parametrize(("dtype", "bits"), [(np.float32, 0x7FC00000), (np.float16, 0x7C00), (np.uint16, 0x7F80)])
def test_values_that_are_not_finite_are_found_without_torch(tmp_path: Path, dtype: type, bits: int) -> None:
    from safetensors.torch import save_file

    from tallystick_protocol.manifest import Piece, TensorSpec

    torch_dtype = {np.float32: torch.float32, np.float16: torch.float16, np.uint16: torch.bfloat16}[dtype]
    name = {np.float32: "F32", np.float16: "F16", np.uint16: "BF16"}[dtype]
    tensor = torch.linspace(-3e4, 3e4, 999).to(torch_dtype)
    save_file({"w": tensor}, tmp_path / "piece")
    size = (tmp_path / "piece").stat().st_size
    piece = Piece("layer", 0, Cid.of_raw(b""), size, {"w": TensorSpec(name, (999,))})
    check_piece_file(tmp_path / "piece", piece)
    whole = torch.int32 if name == "F32" else torch.int16
    tensor.view(whole)[500] = bits
    save_file({"w": tensor}, tmp_path / "piece")
    with pytest.raises(ManifestError, match="w holds NaN or infinity"):
        check_piece_file(tmp_path / "piece", piece)
    with pytest.raises(ManifestError, match="lacks v"):
        check_piece_file(tmp_path / "piece", replace(piece, tensors={"v": TensorSpec(name, (999,))}))
    with pytest.raises(ManifestError, match="manifest says"):
        check_piece_file(tmp_path / "piece", replace(piece, tensors={"w": TensorSpec(name, (9, 111))}))


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoints.llama(tmp_path / "checkpoint", num_hidden_layers=1)
    store = str(tmp_path / "store")
    publish = ["publish", str(folder), "--store", store, "--no-register", "--name", "tiny"]
    assert main([*publish, "--quantize", "int8", "--numerics", "bf16w"]) == 0
    said = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert main(["verify-model", said["manifest"], "--store", store, "--deep", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["sound"], report["name"], report["model"]) == (True, "tiny", said["model"])
    pinned = LocalStore(tmp_path / "store").pins()
    assert Cid.parse(said["manifest"]) in pinned
    assert main(["verify-model", str(Cid.of_raw(b"gone")), "--store", store]) == 1
    assert "BAD" in capsys.readouterr().out
    (folder / "README.md").unlink()
    assert main(publish) == 1
    assert "--licence" in capsys.readouterr().err


def test_publishing_looks_at_key_and_book_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TALLYSTICK_KEY", raising=False)
    publish = ["publish", str(tmp_path / "checkpoint"), "--store", str(tmp_path / "store")]
    assert main(publish) == 1
    assert "which key pays?" in capsys.readouterr().err
    create_keystore(tmp_path / "key.json", "only for tests", fast=True)
    (tmp_path / "password").write_text("only for tests")
    (tmp_path / "password").chmod(0o600)
    keys = ["--key", str(tmp_path / "key.json"), "--password-file", str(tmp_path / "password")]
    assert main([*keys, "--book", str(tmp_path / "none.json"), *publish]) == 1
    assert "there is no address book" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


async def test_a_model_is_verified_from_an_http_source(copy: LocalStore, served: Published, tmp_path: Path) -> None:
    for cid in contents(served.manifest):
        copy.pin(cid)
    runner, url = await serve_content(copy, "127.0.0.1", 0)
    try:
        report = await verify_model(str(served.manifest.cid), tmp_path / "nowhere", [url], deep=True)
        assert report.sound, report.lines()
        assert "canary over layer 1" in {check.what for check in report.checks}
        head = served.manifest.pieces[-1]
        copy.unpin(head.cid)
        lacking = await verify_model(str(served.manifest.cid), tmp_path / "nowhere", [url])
        assert {check.what for check in lacking.checks if not check.ok} == {head.name}
    finally:
        await runner.cleanup()
    assert not (tmp_path / "nowhere").exists()


def drawn(*shown: Progress) -> str:
    """What a terminal of 140 columns shows at the end."""
    terminal = io.StringIO()
    with ProgressBar(Console(file=terminal, force_terminal=True, width=140, color_system=None)) as bar:
        for progress in shown:
            bar.show(progress)
    return terminal.getvalue()


def test_a_bar_tells_bytes_speed_and_the_time_that_is_left() -> None:
    lines = drawn(
        Progress("note", "3 weights [first] are left out", 0, 0, None),
        Progress("pieces", "layer.3 (5 of 14)", 1 << 30, 4 << 30, 190.0, 16.8e6),
        Progress("canary", "layer [/1] of 12", 0, 1 << 30, None),
        Progress("done", "bafk", 1, 1, 0.0),
    ).splitlines()
    assert any("3 weights [first] are left out" in line for line in lines)
    last = [line for line in lines if "writing pieces" in line][-1]
    assert all(part in last for part in ("1.0/4.0 GiB", "16.8 MB/s", "3 min 10 s left", "layer.3 (5 of 14)"))
    last = [line for line in lines if "running the canary" in line][-1]
    assert "layer [/1] of 12" in last and "left" not in last and "/s" not in last


def test_names_and_addresses_in_a_table_are_no_markup() -> None:
    row = {"layers": [0, 2], "node": "0x01", "price_wei": 1, "stake_wei": 10**18, "class": "stock", "rtt_ms": 1.5}
    terminal = io.StringIO()
    Console(file=terminal, width=120).print(nodes_table("evil [/x] [bold]y\\", [{**row, "url": "http://[::1]:8"}]))
    assert "evil [/x] [bold]y\\" in terminal.getvalue()
    assert "http://[::1]:8" in terminal.getvalue()


def test_durations_are_told_as_people_say_them() -> None:
    assert [told(seconds) for seconds in (0.4, 59, 190, 7500)] == ["0 s", "59 s", "3 min 10 s", "2 h 05 min"]
