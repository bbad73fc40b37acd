"""Publishing with options: quantised weights, bf16 weights, experts, tasks, generation settings, room, and resuming."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from harness import checkpoints, task_checkpoints
from harness.checkpoints import Published, Session, change_config, published, reference
from tallystick_model.canary import check_canary
from tallystick_model.loader import load_span, read_piece
from tallystick_model.publishing import plan, precheck, progress
from tallystick_model.publishing.progress import Meter, Progress
from tallystick_model.publishing.quantize import MIN_VALUES, SCALE, dequantise, scales_of, values_of
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.errors import ChainError, ConfigError, CorruptResult, ManifestError
from tallystick_protocol.manifest import Manifest, Piece, Quantization
from tallystick_protocol.types import Span

IDS = torch.arange(40) * 7 % 300


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.llama(tmp_path_factory.mktemp("model") / "checkpoint", num_hidden_layers=2)


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Published:
    return published(folder, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("bits", [8, 4])
def test_quantisation_keeps_each_value_within_half_a_step(bits: Any) -> None:
    for shape in ((48, 100), (3, 16, 66), (5, 32)):
        quantization = Quantization(bits, 32)
        weight = torch.randn(shape) * torch.logspace(-6, 6, shape[-2])[:, None]
        weight[..., 0, :] = 0.0
        scales, values = scales_of(weight, quantization), values_of(weight, quantization)
        found = dequantise("w", values, scales, quantization)
        step = scales.repeat_interleave(32, dim=-1)[..., : shape[-1]]
        assert bool(((found - weight).abs() <= step * 0.5001).all())
        assert torch.equal(found[..., 0, :], weight[..., 0, :])


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_model_is_the_model_with_rounded_matrices(
    folder: Path, plain: Published, tmp_path: Path, kind: str
) -> None:
    served = published(folder, tmp_path / "small", quantize=kind)
    manifest = served.manifest
    assert manifest.quantization == Quantization(8 if kind == "int8" else 4, 128 if kind == "int8" else 32)
    assert manifest.model_id != plain.manifest.model_id
    model = reference(folder, "LlamaForCausalLM")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".layers." in name and parameter.ndim == 2 and parameter.numel() >= MIN_VALUES:
                assert manifest.quantization is not None
                pieces = {tensor for piece in manifest.pieces for tensor in piece.tensors}
                assert name + SCALE in pieces
                spec = (scales_of(parameter, manifest.quantization), values_of(parameter, manifest.quantization))
                parameter.copy_(dequantise(name, spec[1], spec[0], manifest.quantization))
            else:
                assert name + SCALE not in {tensor for piece in manifest.pieces for tensor in piece.tensors}
        expected = model(input_ids=IDS[None]).logits[0]
    assert torch.allclose(Session(served.cut(1)).step(IDS), expected, atol=2e-5, rtol=1e-4)
    layers = [sum(p.bytes for p in m.pieces if p.kind == "layer") for m in (manifest, plain.manifest)]
    assert layers[0] < layers[1] / (2.5 if kind == "int8" else 3.5)


def spoiled(served: Published, change: Callable[[dict[str, torch.Tensor]], object], root: Path) -> tuple[Piece, Path]:
    """The first layer's piece with its file changed."""
    piece = next(piece for piece in served.manifest.pieces if piece.kind == "layer")
    tensors = load_file(served.open_piece(piece))
    change(tensors)
    save_file(tensors, root / "piece")
    return piece, root / "piece"


@pytest.fixture(scope="module")
def small(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Published:
    return published(folder, tmp_path_factory.mktemp("small"), quantize="int8")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e-40])
def test_scales_that_no_quantisation_makes_are_refused(small: Published, tmp_path: Path, value: float) -> None:
    served, name = small, "model.layers.0.self_attn.q_proj.weight"
    piece, path = spoiled(served, lambda tensors: tensors[name + SCALE][0].fill_(value), tmp_path)
    sized = Piece(piece.kind, piece.index, piece.cid, path.stat().st_size, piece.tensors)
    with pytest.raises(ManifestError, match="scale"):
        read_piece(path, sized, [name], served.manifest.quantization)


def test_the_canary_catches_scales_that_are_merely_wrong(small: Published, tmp_path: Path) -> None:
    served = small
    name = "model.layers.0.self_attn.q_proj.weight" + SCALE
    piece, path = spoiled(served, lambda tensors: tensors[name].mul_(1.5), tmp_path)

    def open_piece(asked: Piece) -> Path:
        return path if asked == piece else served.open_piece(asked)

    model = load_span(served.manifest, Span(0, 1), open_piece)
    with pytest.raises(CorruptResult):
        check_canary(model, served.manifest, served.store.get_block)


def test_bf16w_stores_matrices_in_bf16_and_is_a_model_of_its_own(folder: Path, tmp_path: Path) -> None:
    served = published(folder, tmp_path, numerics="bf16w")
    dtypes = {name: spec.dtype for piece in served.manifest.pieces for name, spec in piece.tensors.items()}
    assert served.manifest.numerics == "bf16w"
    assert {dtypes[name] for name in dtypes if "proj" in name or "lm_head" in name} == {"BF16"}
    assert {dtypes[name] for name in dtypes if "norm" in name or "embed" in name} == {"F32"}
    assert check_canary(served.load(Span(0, 2)), served.manifest, served.store.get_block) <= 1e-4


def test_experts_that_a_checkpoint_stores_one_by_one_become_one_tensor(tmp_path: Path) -> None:
    sizes = {**checkpoints.SMALL, **checkpoints.ENDS, "num_hidden_layers": 2}
    config = transformers.MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)
    folder = checkpoints.save(transformers.MixtralForCausalLM, config, tmp_path / "checkpoint", 0)
    assert any(".experts.3." in name for name in load_file(folder / "model.safetensors"))
    served = published(folder, tmp_path)
    expected = reference(folder, "MixtralForCausalLM").state_dict()
    for piece in served.manifest.pieces:
        for name, tensor in load_file(served.open_piece(piece)).items():
            assert torch.equal(tensor, expected[name]), name
    small = published(folder, tmp_path / "small", quantize="int8").manifest
    assert any("experts" in name and name.endswith(SCALE) for piece in small.pieces for name in piece.tensors)


def test_experts_in_mxfp4_are_what_their_four_bits_say(tmp_path: Path) -> None:
    sizes = {**checkpoints.SMALL, **checkpoints.ENDS, "num_hidden_layers": 2, "hidden_size": 64, "head_dim": 16}
    config = transformers.GptOssConfig(**sizes | {"intermediate_size": 96, "num_local_experts": 4})
    folder = checkpoints.save(transformers.GptOssForCausalLM, config, tmp_path / "checkpoint", 0)
    tensors = load_file(folder / "model.safetensors")
    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    table = torch.cat([table, -table])
    expected = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, width, out = tensors.pop(name).shape
        nibbles = torch.randint(0, 16, (experts, out, width // 32, 32), dtype=torch.uint8)
        scales = torch.randint(118, 124, (experts, out, width // 32), dtype=torch.uint8)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4), scales
        values = table[nibbles.long()] * 2.0 ** (scales.float() - 127)[..., None]
        expected[name] = values.flatten(-2).transpose(1, 2).contiguous()
    save_file(tensors, folder / "model.safetensors")
    change_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    served = published(folder, tmp_path)
    layers = [load_file(served.open_piece(piece)) for piece in served.manifest.pieces if piece.kind == "layer"]
    held = {name: tensor for layer in layers for name, tensor in layer.items() if name in expected}
    assert held.keys() == expected.keys() and {tensor.dtype for tensor in held.values()} == {torch.bfloat16}
    assert all(torch.equal(held[name].float(), expected[name]) for name in expected)
    name = min(expected)
    tensors[f"{name}_scales"] = tensors[f"{name}_scales"][..., 1:].contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ManifestError, match="are not MXFP4"):
        published(folder, tmp_path / "again")


TASKS = {
    "MaskedLM": ("fill-mask", "logits", ()),
    "SequenceClassification": ("text-classification", "label", ("no", "yes")),
    "TokenClassification": ("token-classification", "scores", ("no", "yes")),
    "QuestionAnswering": ("question-answering", "scores", ("start", "end")),
}


@pytest.mark.parametrize("head", sorted(TASKS))
def test_a_head_says_its_task_and_its_labels(tmp_path: Path, head: str) -> None:
    folder = task_checkpoints.bert(tmp_path / "checkpoint", head, num_hidden_layers=1, id2label={0: "no", 1: "yes"})
    manifest = published(folder, tmp_path).manifest
    assert (manifest.task, manifest.output, manifest.labels) == TASKS[head]


def test_labels_that_are_not_counted_from_zero_are_refused(tmp_path: Path) -> None:
    folder = task_checkpoints.bert(tmp_path / "checkpoint", "SequenceClassification", num_hidden_layers=1)
    change_config(folder, id2label={"0": "no", "2": "yes"})
    with pytest.raises(ManifestError, match="id2label"):
        published(folder, tmp_path)


def test_generation_settings_are_kept_and_bounded(folder: Path, tmp_path: Path) -> None:
    copy = checkpoints.llama(tmp_path / "checkpoint", num_hidden_layers=1)
    said = {
        "bos_token_id": 0, "eos_token_id": [1, 7], "pad_token_id": 2, "forced_bos_token_id": 5,
        "forced_eos_token_id": 1, "suppress_tokens": [3], "bad_words_ids": [[4, 5]], "num_beams": 4,
        "length_penalty": 0.8, "max_length": 90, "do_sample": True, "temperature": 0.6,
    }  # fmt: skip
    (copy / "generation_config.json").write_text(json.dumps(said))
    found = published(copy, tmp_path).manifest.generation
    assert found == {
        "eos": [1, 7], "bos": 0, "pad": 2, "forced_bos": 5, "forced_eos": [1], "suppress": [3], "bad_words": [[4, 5]],
        "num_beams": 4, "length_penalty": 0.8, "max_length": 90, "do_sample": True, "temperature": 0.6,
    }  # fmt: skip
    for wrong in ({"num_beams": 10**6}, {"temperature": 1e9}, {"suppress_tokens": [-1]}, {"bad_words_ids": [[999]]}):
        (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **wrong}))
        with pytest.raises(ManifestError, match=next(iter(wrong))):
            published(copy, tmp_path)


def test_a_model_too_large_for_disk_or_memory_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 300 << 20})
    monkeypatch.setattr(precheck.shutil, "disk_usage", lambda path: usage)
    precheck.check_disk(tmp_path, 1 << 20)
    with pytest.raises(ConfigError, match=r"0\.72 GiB are missing"):
        precheck.check_disk(tmp_path, 784 << 20)
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 1048576 kB\n")
    with pytest.raises(ConfigError, match=r"1\.25 GiB are missing"):
        precheck.check_memory(2 << 30, tmp_path / "meminfo")
    usage.free = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(plan, "rehearse", lambda *_: pytest.fail("what takes a while comes after"))
    with pytest.raises(ConfigError, match="missing"):
        published(folder, tmp_path / "root")
    assert [path for path in (tmp_path / "root" / "store").rglob("*") if path.is_file()] == []


def test_a_refused_checkpoint_leaves_nothing_that_can_be_seen(tmp_path: Path) -> None:
    folder = checkpoints.llama(tmp_path / "checkpoint", num_hidden_layers=2)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ManifestError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        published(folder, tmp_path)
    store = LocalStore(tmp_path / "store")
    assert store.pins() == ()
    store.collect_garbage()
    left = [path for part in ("blocks", "files", "new", "publishing") for path in (store.root / part).rglob("*")]
    assert [path for path in left if path.is_file()] == []


KILLED = """
import os, signal, sys
from pathlib import Path
from tallystick_model.publish import publish
from tallystick_protocol.content.store import LocalStore
def stop(progress):
    if progress.stage == sys.argv[3] and progress.detail.startswith(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
publish(Path(sys.argv[1]), LocalStore(Path(sys.argv[2])), progress=stop)
"""


@pytest.mark.parametrize(("stage", "detail", "skipped"), [("pieces", "layer.1", 2), ("canary", "layer 2", 4)])
def test_a_killed_publication_goes_on_where_it_stopped(
    folder: Path, plain: Published, tmp_path: Path, stage: str, detail: str, skipped: int
) -> None:
    expected = plain.manifest
    store = LocalStore(tmp_path / "root" / "store")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(store.root), stage, detail],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-500:]
    assert store.pins() == ()
    written: list[str] = []
    put_file = store.put_file
    store.put_file = lambda source: written.append(getattr(source, "piece", "")) or put_file(source)  # type: ignore
    seen: list[Progress] = []
    from tallystick_model.publish import publish

    assert publish(folder, store, progress=seen.append) == expected
    assert len([name for name in written if name]) == len(expected.pieces) - skipped
    assert [path for path in (store.root / "publishing").rglob("*") if path.is_file()] == []
    walked = [progress.detail for progress in seen if progress.stage == "canary"]
    assert walked[0].startswith("layer 2" if stage == "canary" else "layer 1")


def test_what_fails_at_the_end_is_made_good_by_the_same_command(
    folder: Path, plain: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(manifest: Manifest) -> None:
        raise ChainError("the chain does not answer")

    with pytest.raises(ChainError):
        published(folder, tmp_path, finish=fail)
    monkeypatch.setattr(precheck.shutil, "disk_usage", lambda path: type("Usage", (), {"free": (256 << 20) + 1}))
    seen: list[Progress] = []
    finished: list[Manifest] = []
    assert published(folder, tmp_path, progress=seen.append, finish=finished.append).manifest == plain.manifest
    assert finished == [plain.manifest]
    assert {(one.stage, one.rate) for one in seen} == {("pieces", None), ("canary", None), ("done", None)}
    assert [path for path in (tmp_path / "store" / "publishing").rglob("*") if path.is_file()] == []


def test_two_do_not_publish_the_same_at_once(folder: Path, plain: Published, tmp_path: Path) -> None:
    refused: list[str] = []

    def try_too(progress: Progress) -> None:
        if progress.stage == "pieces" and not refused:
            with pytest.raises(ConfigError) as error:
                published(folder, tmp_path)
            refused.append(error.value.message)

    assert published(folder, tmp_path, progress=try_too).manifest == plain.manifest
    assert "another process publishes this checkpoint" in refused[0]


def test_speed_and_time_are_of_this_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(second) for second in range(10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    seen: list[Progress] = []
    meter = Meter(seen.append, "pieces", 1000)
    meter.skip(900)
    meter.begin("layer.9")
    meter.add(20)
    assert (seen[0].done, seen[0].rate, seen[0].eta_s) == (900, None, None)
    assert (seen[-1].done, seen[-1].rate, seen[-1].eta_s) == (920, 20 / 3, 12.0)


def test_progress_counts_every_byte_and_ends(folder: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    manifest = published(folder, tmp_path, progress=seen.append).manifest
    total = sum(piece.bytes for piece in manifest.pieces)
    written = [progress for progress in seen if progress.stage == "pieces"]
    assert (written[-1].done, written[-1].total) == (total, total)
    assert [progress.done for progress in written] == sorted(progress.done for progress in written)
    assert seen[-1] == Progress("done", str(manifest.cid), 1, 1, 0.0)
