"""GGUF files: the weights, the config and the tokenizer that transformers makes of them, and the same answers."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer

from harness import checkpoints
from harness.checkpoints import Published, published
from harness.gguf_files import KINDS, random_model, word_list, write_gguf
from tallystick_devnet.bench.gguf_file import llama_gguf
from tallystick_model.publishing import gguf as source
from tallystick_model.publishing import plan
from tallystick_model.publishing.gguf import GgufCheckpoint
from tallystick_model.publishing.gguf_header import check_header
from tallystick_model.sandbox import conversion
from tallystick_model.segments import Segment
from tallystick_protocol.errors import ManifestError
from tallystick_protocol.types import Span

IDS = torch.arange(17) * 7 % 300
DAILY = ("llama", "qwen2", "qwen3", "phi3", "stablelm", "gpt2", "starcoder2", "nemotron", "gemma3", "t5")
UNLIKE = {"qwen2moe", "qwen3moe", "t5"}
"""What transformers' own loader does not load, or with another activation: held to the model that was written."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Converting a tokenizer in this process, for importing transformers anew takes seconds; no rehearsal."""

    def convert(folder: Path, out: Path, *, gguf: str | None = None) -> None:
        try:
            conversion.convert({"folder": str(folder), "out": str(out), "gguf": gguf})
        except ValueError as error:
            raise ManifestError(str(error)) from None

    monkeypatch.setattr(source, "convert_tokenizer", convert)
    monkeypatch.setattr(plan, "rehearse", lambda *_: None)


def loaded(file: Path, arch: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The file as transformers loads it; it asks for the package accelerate and does not use it."""
    monkeypatch.setattr(transformers.modeling_utils, "is_accelerate_available", lambda: True)
    cls = getattr(transformers, KINDS[arch].model)
    return cls.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    inputs = {"decoder_input_ids": IDS[None]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        rows: torch.Tensor = model(input_ids=IDS[None], **inputs).logits[0]
    return rows


def served_logits(served: Published) -> torch.Tensor:
    manifest, memory = served.manifest, None
    if manifest.encoder_layers:
        encoder = served.load(Span(0, manifest.encoder_layers))
        memory = encoder.forward([Segment(None, 0, IDS)])[0]
    model = served.load(Span(manifest.encoder_layers, manifest.layers))
    return model.forward([Segment(model.new_cache(len(IDS), memory), 0, IDS)])[0]


@pytest.mark.parametrize(
    "arch", [arch if arch in DAILY else pytest.param(arch, marks=pytest.mark.nightly) for arch in KINDS]
)
def test_a_file_is_the_model_that_was_written_and_that_transformers_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: None, arch: str
) -> None:
    model = random_model(arch)
    file = write_gguf(tmp_path / "tiny.gguf", arch, model)
    found, written = served_logits(published(file, tmp_path)), logits(model)
    assert torch.allclose(found, written, atol=1e-4, rtol=1e-4)
    if arch not in UNLIKE:
        assert torch.allclose(found, logits(loaded(file, arch, monkeypatch)), atol=1e-4, rtol=1e-4)


def test_a_quantised_file_is_dequantised_and_says_what_it_is(tmp_path: Path) -> None:
    """In a process of its own, as a publisher has it."""
    sizes = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2}
    folder = checkpoints.llama(tmp_path / "checkpoint", **sizes)
    file = llama_gguf(folder, tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.Q8_0)
    served = published(file, tmp_path)
    reference = checkpoints.reference(folder, "LlamaForCausalLM")
    for parameter in reference.parameters():
        if parameter.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            parameter.data = torch.tensor(gguf.dequantize(gguf.quantize(parameter.data.numpy(), kind), kind))
    assert torch.allclose(served_logits(served), logits(reference), atol=1e-4, rtol=1e-4)
    manifest = served.manifest
    assert (manifest.name, manifest.licence, manifest.task) == ("tiny", "cc0-1.0", "text-generation")
    assert (manifest.generation["eos"], manifest.generation["bos"], manifest.max_length) == ([1], 0, 1024)
    assert encoded(served, checkpoints.TEXT) == checkpoints.tokenizer().encode(checkpoints.TEXT).ids


def encoded(served: Published, text: str) -> list[int]:
    ref = served.manifest.tokenizer["tokenizer.json"]
    path = served.folder / "tokenizer.json"
    served.store.read_file(ref.cid, path, ref.bytes)
    ids: list[int] = Tokenizer.from_file(str(path)).encode(text).ids
    return ids


def test_the_tokenizer_has_the_files_tokens_and_no_others(tmp_path: Path, in_process: None) -> None:
    """transformers brings <|endoftext|> and <mask>, and spells in bytes what has other characters."""
    words = word_list()
    words[0], words[7] = "<｜begin▁of▁sentence｜>", "<|turn|>"
    (tmp_path / "tokenizer.json").write_text("{}")  # of another model, that lies in the same folder
    file = write_gguf(
        tmp_path / "tiny.gguf", "gemma2", random_model("gemma2"), words=words,
        keys={
            "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.eot_token_id": 7,
            "tokenizer.chat_template": "{{ bos_token }}",
        },
    )  # fmt: skip
    served = published(file, tmp_path)
    plain = checkpoints.tokenizer().encode("A tally <|endoftext|>").ids
    assert encoded(served, "A tally <|endoftext|>") == [0, *plain]
    assert encoded(served, "<｜begin▁of▁sentence｜>A") == [0, 0, *checkpoints.tokenizer().encode("A").ids]
    assert served.manifest.generation["eos"] == [1, 7]
    ref = served.manifest.tokenizer["tokenizer_config.json"]
    served.store.read_file(ref.cid, tmp_path / "settings", ref.bytes)
    settings = json.loads((tmp_path / "settings").read_text())
    assert settings["bos_token"] == words[0]
    assert not {"<|endoftext|>", "<mask>"} & {value for value in settings.values() if isinstance(value, str)}
    assert "chat_template.jinja" in served.manifest.tokenizer


ROPE = {
    "base": ({"starcoder2.rope.freq_base": 9e5}, "starcoder2", {"rope_theta": 9e5}),
    "linear": (
        {"qwen2.rope.scaling.type": "linear", "qwen2.rope.scaling.factor": 4.0}, "qwen2",
        {"rope_type": "linear", "factor": 4.0},
    ),
    "yarn": (
        {"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0,
         "qwen2.rope.scaling.original_context_length": 64}, "qwen2",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "llama3": (
        {}, "llama", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 8192},
    ),
}  # fmt: skip
"""What a file says of its rotary tables, by its keys or a table, and transformers' reader does not hear."""


@pytest.mark.parametrize("what", sorted(ROPE))
def test_rotary_tables_are_those_that_the_file_says(tmp_path: Path, in_process: None, what: str) -> None:
    keys, arch, parameters = ROPE[what]
    model = random_model(arch, rope_parameters={"rope_theta": 10000.0, "rope_type": "default", **parameters})
    file = write_gguf(tmp_path / "tiny.gguf", arch, model, keys=keys)
    assert torch.allclose(served_logits(published(file, tmp_path)), logits(model), atol=1e-4, rtol=1e-4)


HALVES = np.full(8, 1.5)
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "scaled by nobody knows what": ("qwen2", {"qwen2.rope.scaling.type": "longrope"}, "scaled by longrope"),
    "no architecture of transformers": ("qwen2", {"general.architecture": "rwkv9"}, "rwkv9"),
    "a table of its own": ("phi3", {"rope_factors_long.weight": HALVES}, "leaves out its rope_factors_long.weight"),
    "a scaling that is not Llama's": ("llama", {"rope_freqs.weight": HALVES}, "none that Llama 3.1"),
}


@pytest.mark.parametrize("what", sorted(REFUSED))
def test_what_would_become_another_model_is_refused(tmp_path: Path, in_process: None, what: str) -> None:
    arch, changes, message = REFUSED[what]
    tables = {name: value for name, value in changes.items() if isinstance(value, np.ndarray)}
    keys = {name: value for name, value in changes.items() if name not in tables}
    file = write_gguf(tmp_path / "tiny.gguf", arch, random_model(arch), keys=keys, tables=tables)
    with pytest.raises(ManifestError, match=message):
        GgufCheckpoint(file, tmp_path)


def counts(tensors: int, keys: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys)


def key(kind: int, rest: bytes) -> bytes:
    return counts(0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<I", kind) + rest


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "another format": b"GGML" + bytes(100),
    "zeros": b"GGUF" + bytes(100),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "many keys": counts(0, 1 << 60) + bytes(64),
    "many tensors": counts(1 << 22, 0) + bytes(64),
    "a long name": counts(0, 1) + struct.pack("<Q", 1 << 63) + bytes(64),
    "a long string": key(8, struct.pack("<Q", 1 << 40) + bytes(64)),
    "a long array": key(9, struct.pack("<IQ", 4, 1 << 60) + bytes(64)),
    "a long array of strings": key(9, struct.pack("<IQ", 8, 1 << 22) + bytes(64)),
    "arrays in arrays in arrays": key(9, (struct.pack("<IQ", 9, 1) * 3) + bytes(64)),
    "an unknown type": key(77, bytes(64)),
    "many dimensions": counts(1, 0) + struct.pack("<QI", 0, 1 << 30) + bytes(64),
}


@pytest.mark.parametrize("what", sorted(HOSTILE))
def test_a_hostile_header_is_refused_before_anybody_believes_it(tmp_path: Path, what: str) -> None:
    (tmp_path / "bad.gguf").write_bytes(HOSTILE[what])
    with pytest.raises(ManifestError, match=r"bad\.gguf cannot be read as GGUF"):
        published(tmp_path / "bad.gguf", tmp_path)


def test_a_header_that_is_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    model = random_model("qwen2")
    whole = write_gguf(tmp_path / "tiny.gguf", "qwen2", model).read_bytes()
    check_header(tmp_path / "tiny.gguf")
    begin = len(whole) - sum(tensor.nbytes for tensor in model.state_dict().values())
    for end in range(0, begin - 64, 97):
        (tmp_path / "cut.gguf").write_bytes(whole[:end])
        with pytest.raises(ManifestError, match="GGUF"):
            check_header(tmp_path / "cut.gguf")
