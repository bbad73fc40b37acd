"""A span loads what the manifest lists and nothing else (hostile catalogue M05-M10, T06-T16)."""

from __future__ import annotations

import gc
import json
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from harness import checkpoints
from harness.checkpoints import Published, Session, published
from tallystick_model.canary import check_canary
from tallystick_model.loader import load_span, read_piece
from tallystick_model.segments import Segment
from tallystick_model.skeleton import Lent
from tallystick_model.span import Execution
from tallystick_protocol.errors import BadPosition, BadTensor, ContextLengthExceeded, CorruptResult, ManifestError
from tallystick_protocol.manifest import Numerics, Piece, TensorSpec
from tallystick_protocol.types import Span

NORM = "model.layers.1.input_layernorm.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Published:
    root = tmp_path_factory.mktemp("loader")
    torch.set_num_threads(1)
    return published(checkpoints.llama(root / "checkpoint", tie_word_embeddings=True), root)


def hostile(served: Published, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> tuple[Path, Piece]:
    """layer.1 rewritten; its size in the manifest is made to fit."""
    piece = next(piece for piece in served.manifest.pieces if piece.name == "layer.1")
    tensors = load_file(served.open_piece(piece))
    change(tensors)
    path = folder / "hostile"
    save_file(tensors, path)
    return path, replace(piece, bytes=path.stat().st_size)


CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "wrong name": (lambda tensors: tensors.update({"model.layers.2.x": tensors.pop(NORM)}), "lacks"),
    "missing": (lambda tensors: tensors.pop(NORM), "lacks"),
    "extra": (lambda tensors: tensors.update(extra=torch.zeros(2)), "extra"),
    "wrong shape": (lambda tensors: tensors.update({NORM: torch.ones(71)}), "shape|says"),
    "transposed": (lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": torch.ones(72, 100)}), "says"),
    "wrong dtype": (lambda tensors: tensors.update({NORM: tensors[NORM].half()}), "F16"),
    "an integer": (lambda tensors: tensors.update({NORM: tensors[NORM].int()}), "I32"),
    "nan": (lambda tensors: tensors[NORM].__setitem__(3, float("nan")), "NaN"),
    "infinity": (lambda tensors: tensors[QUERY].__setitem__((1, 1), float("inf")), "NaN or infinity"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system what is mapped")
@pytest.mark.parametrize(
    ("name", "numerics", "execution"),
    [
        ("llama", "fp32", "canonical"), ("llama", "bf16w", "canonical"), ("llama", "fp32", "stock"),
        ("gpt2", "fp32", "canonical"), ("bert", "fp32", "canonical"), ("experts", "bf16w", "canonical"),
    ],
)  # fmt: skip
def test_nothing_of_a_loaded_span_stays_in_the_mapping_of_its_pieces(
    name: str, numerics: Numerics, execution: Execution, tmp_path: Path
) -> None:
    """What is mapped would change with the file, after it was checked."""
    if name == "experts":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=3, vocab_size=320)
        folder = checkpoints.save(MixtralForCausalLM, config, tmp_path / "checkpoint", 0, torch.bfloat16)
    else:
        folder = getattr(checkpoints, name)(tmp_path / "checkpoint")
    served = published(folder, tmp_path, numerics=numerics)
    span = served.load(Span(0, served.manifest.layers), execution)
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    del span


def test_what_stands_under_several_names_is_kept_once_and_in_the_models_dtype() -> None:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(4, 3, bias=False) for name in ("one", "other", "packed")})
    stored = torch.arange(12, dtype=torch.bfloat16).view(3, 4)
    lent = [Lent(model, f"{name}.weight", "table", stored) for name in model]
    model["packed"] = torch.nn.Identity()
    copies: dict[Any, torch.Tensor] = {}
    for weight in lent:
        weight.keep(copies)
    one, other = model["one"].weight, model["other"].weight
    assert one.dtype is torch.float32 and torch.equal(one, stored.float())
    assert one.data_ptr() == other.data_ptr() != stored.data_ptr()


@pytest.mark.parametrize("what", sorted(CHANGES))
def test_a_piece_with_a_tensor_that_does_not_fit_is_refused(served: Published, tmp_path: Path, what: str) -> None:
    change, message = CHANGES[what]
    path, piece = hostile(served, tmp_path, lambda tensors: (change(tensors), None)[1])
    with pytest.raises(ManifestError, match=message):
        read_piece(path, piece, tuple(piece.tensors))


def with_header(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + body


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 a zip",
        b"\x80\x04}q\x00.",
        with_header(b"not json"),
        struct.pack("<Q", 1 << 60),
        with_header(
            json.dumps({NORM: {"dtype": "F32", "shape": [72], "data_offsets": [0, 1 << 40]}}).encode(), b"\0" * 288
        ),
        with_header(
            json.dumps({NORM: {"dtype": "F32", "shape": [1 << 62, 8], "data_offsets": [0, 288]}}).encode(), b"\0" * 288
        ),
        with_header(
            json.dumps({NORM: {"dtype": "F32", "shape": [72], "data_offsets": [8, 296]}}).encode(), b"\0" * 296
        ),
    ],
    ids=["empty", "zip", "pickle", "not json", "header size", "offsets", "overflow", "hole"],
)
def test_a_piece_that_is_no_safetensors_file_is_refused(served: Published, tmp_path: Path, content: bytes) -> None:
    piece = next(piece for piece in served.manifest.pieces if piece.name == "layer.1")
    path = tmp_path / "hostile"
    path.write_bytes(content)
    with pytest.raises(ManifestError, match=r"layer\.1"):
        read_piece(path, replace(piece, bytes=len(content)), tuple(piece.tensors))
    with pytest.raises(ManifestError, match="bytes"):
        read_piece(path, replace(piece, bytes=len(content) + 1), tuple(piece.tensors))


def test_a_manifest_that_contradicts_its_config_is_refused(served: Published) -> None:
    manifest = served.manifest
    layer = manifest.pieces[1]
    shifted = replace(
        layer, tensors=layer.tensors | {"model.layers.0.input_layernorm.weight": TensorSpec("F32", (71,))}
    )
    missing = replace(layer, tensors={name: spec for name, spec in layer.tensors.items() if "layernorm" not in name})
    for wrong in (
        replace(manifest, width=64),
        replace(manifest, vocab=100),
        replace(manifest, causal=False),
        replace(manifest, tied={}),
        replace(manifest, output="hidden"),
        replace(manifest, architecture="BertModel"),
        replace(manifest, pieces=manifest.pieces[:-1]),
        replace(manifest, pieces=(manifest.pieces[0], shifted)),
        replace(manifest, pieces=(manifest.pieces[0], missing)),
        replace(manifest, config={**manifest.config, "auto_map": {}}),
    ):
        with pytest.raises(ManifestError):
            load_span(wrong, Span(0, 1), served.open_piece)


def test_a_model_without_a_canonical_rule_is_refused_and_served_stock(served: Published) -> None:
    with pytest.raises(ManifestError, match="layers"):
        served.load(Span(3, 9))


def test_one_wrong_weight_fails_the_canary(served: Published, tmp_path: Path) -> None:
    path, piece = hostile(served, tmp_path, lambda tensors: tensors[QUERY].__setitem__((0, 0), 5.0))
    manifest = replace(
        served.manifest, pieces=tuple(piece if p.name == "layer.1" else p for p in served.manifest.pieces)
    )
    opener = lambda wanted: path if wanted.name == "layer.1" else served.open_piece(wanted)  # noqa: E731
    with pytest.raises(CorruptResult, match="canary"):
        check_canary(load_span(manifest, Span(1, 3), opener), manifest, served.store.get_block)


@pytest.mark.parametrize("span", [Span(0, 4), Span(0, 1), Span(1, 3), Span(3, 4)], ids=str)
def test_honest_spans_pass_the_canary(served: Published, span: Span) -> None:
    for execution in ("canonical", "stock"):
        assert check_canary(served.load(span, execution), served.manifest, served.store.get_block) < 1e-5  # type: ignore[arg-type]


def test_a_nan_in_the_canary_does_not_pass_as_equal(served: Published) -> None:
    count, width = len(served.manifest.canary.ids), served.manifest.width
    with pytest.raises(ManifestError, match="NaN"):
        check_canary(served.load(Span(1, 2)), served.manifest, lambda cid: b"\x00\x00\xc0\x7f" * (count * width))


def test_bad_rows_are_refused_and_change_nothing(served: Published) -> None:
    first, second = served.cut(2)
    ids = torch.arange(10)
    cache, other = first.new_cache(20), second.new_cache(20)
    rows = first.forward([Segment(cache, 0, ids)])[0]
    second.forward([Segment(other, 0, rows)])
    bad = rows.clone()
    bad[3, 3] = float("nan")
    for span, segment, error in [
        (first, Segment(cache, 10, torch.tensor([320])), BadTensor),
        (first, Segment(cache, 10, torch.tensor([-1])), BadTensor),
        (first, Segment(cache, 10, ids.int()), BadTensor),
        (first, Segment(cache, 10, ids[None]), BadTensor),
        (first, Segment(cache, 10, ids[:0]), BadTensor),
        (first, Segment(cache, 9, ids), BadPosition),
        (first, Segment(cache, 11, ids), BadPosition),
        (first, Segment(None, 0, ids), BadPosition),
        (first, Segment(cache, 10, torch.zeros(11, dtype=torch.int64)), ContextLengthExceeded),
        (second, Segment(other, 10, bad), BadTensor),
        (second, Segment(other, 10, rows[:, :-1]), BadTensor),
        (second, Segment(other, 10, rows.double()), BadTensor),
        (second, Segment(other, 10, rows, wanted=[10]), BadPosition),
    ]:
        with pytest.raises(error):
            span.forward([segment])
    with pytest.raises(BadPosition):
        first.forward([Segment(cache, 10, ids[:2]), Segment(cache, 10, ids[:2])])
    with pytest.raises(ContextLengthExceeded):
        first.new_cache(1025)
    assert (cache.length, other.length) == (10, 10)  # type: ignore[union-attr]
    expected = Session(served.cut(2)).step(torch.cat([ids, ids]))[10:]
    assert torch.equal(second.forward([Segment(other, 10, first.forward([Segment(cache, 10, ids)])[0])])[0], expected)


@pytest.mark.parametrize("execution", ["canonical", "stock"])
def test_a_step_that_fails_halfway_leaves_its_cache_as_it_was(
    served: Published, execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session([served.load(Span(0, 4), execution)])
    session.step(torch.arange(10))
    layer = session.spans[0]._spliced.skeleton.layers[2]
    with monkeypatch.context() as broken:
        broken.setattr(layer, "forward", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.step(torch.arange(5))
    again = Session([served.load(Span(0, 4), execution)])
    again.step(torch.arange(10))
    assert torch.equal(session.step(torch.arange(7)), again.step(torch.arange(7)))


def test_denormals_are_zero_within_a_step_and_the_callers_own_afterwards(served: Published) -> None:
    span = served.load(Span(1, 2))
    denormal = torch.full((4, 72), 1e-42)
    assert torch.equal(
        span.forward([Segment(span.new_cache(9), 0, denormal)])[0],
        span.forward([Segment(span.new_cache(9), 0, torch.zeros(4, 72))])[0],
    )
    assert sys.float_info.min / 2 > 0


def test_only_wanted_logits_come_back_and_minus_zero_does_not(served: Published) -> None:
    whole = Session(served.cut()).step(torch.arange(9))
    session = Session(served.cut())
    assert torch.equal(session.step(torch.arange(9), wanted=[2, 8]), whole[[2, 8]])
    assert session.step(torch.arange(3), wanted=[]).shape == (0, served.manifest.vocab)
    hidden = Session(served.cut(2)[:1]).step(torch.arange(9))
    assert not bool((torch.signbit(hidden) & (hidden == 0)).any())


def test_a_cache_grows_and_counts_its_bytes(served: Published) -> None:
    span = served.load(Span(1, 3))
    cache = span.new_cache(200)
    assert cache is not None
    assert (cache.size_bytes, span.row_bytes) == (0, 2 * 4 * 2 * (12 + 12))
    span.forward([Segment(cache, 0, torch.randn(70, 72))])
    assert cache.size_bytes == 80 * span.row_bytes
