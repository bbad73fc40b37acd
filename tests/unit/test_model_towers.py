"""Text models with towers, tables of indices or no cache: published, cut and compared with the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from census.configs import Entry, entries, tiny_config
from harness.checkpoints import Session, change_config, published, reference, save
from tallystick_model.publishing.checkpoint import Checkpoint
from tallystick_model.publishing.progress import Progress
from tallystick_model.replay import ReplayCache
from tallystick_protocol.errors import ManifestError
from tallystick_protocol.manifest import Manifest

IDS = torch.arange(20, 37)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def entry(name: str) -> Entry:
    return next(one for one in entries() if one.name == name)


def saved(name: str, folder: Path) -> Path:
    one = entry(name)
    save(getattr(transformers, one.architecture), tiny_config(one), folder, 0)
    change_config(folder, architectures=[one.architecture])
    return folder


def stored(manifest: Manifest) -> set[str]:
    return {name for piece in manifest.pieces for name in piece.tensors}


@pytest.mark.parametrize(
    ("name", "tower"),
    [("gemma3:causal", "vision_tower"), ("voxtral:seq2seq", "audio_tower"), ("mllama:causal", "cross_attn")],
)
def test_a_model_with_a_tower_is_served_on_text_without_it(tmp_path: Path, name: str, tower: str) -> None:
    folder = saved(name, tmp_path / "checkpoint")
    said: list[Progress] = []
    served = published(folder, tmp_path, progress=said.append)
    assert any(tower in tensor for tensor in Checkpoint(folder).names())
    assert not any(tower in tensor for tensor in stored(served.manifest))
    assert "left out" in next(one.detail for one in said if one.stage == "note")
    assert served.manifest.task == "text-generation"
    with torch.no_grad():
        whole = reference(folder, entry(name).architecture)(input_ids=IDS[None]).logits[0]
    assert torch.equal(Session(served.cut(2, execution="stock"), 64).step(IDS), whole)


def test_a_vision_model_of_the_hubs_table_is_served_on_text(tmp_path: Path) -> None:
    text = {"model_type": "mistral", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    vision = {"model_type": "pixtral", "hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 3,
              "num_attention_heads": 4, "head_dim": 24, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=10)
    folder = save(transformers.Mistral3ForConditionalGeneration, config, tmp_path / "checkpoint", 0)
    served = published(folder, tmp_path)
    assert (served.manifest.layers, served.manifest.task) == (2, "text-generation")
    with torch.no_grad():
        whole = reference(folder, "Mistral3ForConditionalGeneration")(input_ids=IDS[None]).logits[0]
    assert torch.equal(Session(served.cut(1, execution="stock"), 64).step(IDS), whole)


def test_a_model_without_a_cache_computes_all_rows_again(tmp_path: Path) -> None:
    folder = saved("openai-gpt:causal", tmp_path / "checkpoint")
    served = published(folder, tmp_path)
    with torch.no_grad():
        whole = reference(folder, "OpenAIGPTLMHeadModel")(input_ids=IDS[None]).logits[0]
    assert torch.equal(Session(served.cut(2, execution="stock"), 64).step(IDS), whole)
    session = Session(served.cut(2), 64)
    assert isinstance(session.caches[0], ReplayCache)
    rows = session.step(IDS)
    torch.testing.assert_close(rows, whole, rtol=1e-4, atol=1e-4)
    again = Session(session.spans, 64)
    assert torch.equal(again.steps(IDS, [5, 1, 8, 3]), rows)
    for cache in again.caches:
        assert cache is not None
        cache.crop(9)
    again.length = 9
    assert torch.equal(again.step(IDS[9:]), rows[9:])


@pytest.mark.parametrize("execution", ["stock", "canonical"])
def test_rows_behind_a_recurrent_state_are_those_of_one_run(tmp_path: Path, execution: Any) -> None:
    folder = saved("mamba:causal", tmp_path / "checkpoint")
    served = published(folder, tmp_path)
    with torch.no_grad():
        whole = reference(folder, "MambaForCausalLM")(input_ids=IDS[None], use_cache=False).logits[0]
    found = Session(served.cut(2, execution=execution), 64).steps(IDS, [8, 6, 1, 2])
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4 * float(whole.std()))


def test_tables_of_indices_are_published_and_checked(tmp_path: Path) -> None:
    folder = saved("deepseek_v4:causal", tmp_path / "checkpoint")
    served = published(folder, tmp_path)
    kinds = {spec.dtype for piece in served.manifest.pieces for spec in piece.tensors.values()}
    assert kinds == {"F32", "I64"}
    with torch.no_grad():
        whole = reference(folder, "DeepseekV4ForCausalLM")(input_ids=IDS[None]).logits[0]
    assert torch.equal(Session(served.cut(2, execution="stock"), 64).step(IDS), whole)


def test_a_model_whose_cached_rows_differ_from_its_own_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"in transformers itself|cannot be cut"):
        published(saved("fsmt:seq2seq", tmp_path / "checkpoint"), tmp_path)
