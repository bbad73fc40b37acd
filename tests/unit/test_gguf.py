"""GGUF files: the weights and the config that transformers makes of them, and the same answers."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from harness import checkpoints
from harness.checkpoints import Session, published
from tallystick_devnet.bench.gguf_file import llama_gguf
from tallystick_protocol.errors import ManifestError

QUANTISED = gguf.GGMLQuantizationType.Q8_0


def test_a_gguf_file_is_the_model_that_transformers_makes_of_it(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folder = tmp_path
    sizes = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2}
    file = llama_gguf(checkpoints.llama(folder / "checkpoint", **sizes), folder / "tiny.gguf", QUANTISED)
    served = published(file, tmp_path)
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(folder / "checkpoint")).eval()
    parsed = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=reference)
    reference.load_state_dict(parsed["tensors"])
    ids = torch.randint(0, 320, (20,))
    with torch.no_grad():
        expected = reference(input_ids=ids[None]).logits[0]
    found = Session(served.cut(1)).step(ids)
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)
    manifest = served.manifest
    assert (manifest.name, manifest.licence, manifest.task) == ("tiny", "cc0-1.0", "text-generation")
    assert (manifest.generation["eos"], manifest.generation["bos"], manifest.max_length) == ([1], 0, 1024)
    path = tmp_path / "tokenizer.json"
    ref = served.manifest.tokenizer["tokenizer.json"]
    served.store.read_file(ref.cid, path, ref.bytes)
    found = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    made_of = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file.parent / "checkpoint" / "tokenizer.json"))
    assert found.encode(checkpoints.TEXT) == made_of.encode(checkpoints.TEXT)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ManifestError, match="GGUF"):
        published(tmp_path / "bad.gguf", tmp_path)
