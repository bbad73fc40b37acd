"""Checkpoints as older releases laid them out: more tensors than the class has, another class than the one meant."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from harness import checkpoints, task_checkpoints
from harness.checkpoints import Session, change_config, published, reference
from tallystick_model.publishing.checkpoint import Checkpoint
from tallystick_model.publishing.plan import Plan
from tallystick_model.publishing.progress import Progress
from tallystick_protocol.errors import ManifestError

WIDTH = task_checkpoints.BERT_SMALL["hidden_size"]
POOLER = {"bert.pooler.dense.weight": (WIDTH, WIDTH), "bert.pooler.dense.bias": (WIDTH,)}
NEXT_SENTENCE = {"cls.seq_relationship.weight": (2, WIDTH), "cls.seq_relationship.bias": (2,)}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def add(folder: Path, shapes: dict[str, tuple[int, ...]], **more: torch.Tensor) -> list[str]:
    """Put tensors beside a checkpoint's own; returns their names."""
    path = folder / "model.safetensors"
    made = {name: torch.rand(shape) for name, shape in shapes.items()} | more
    save_file({**load_file(path), **made}, path, metadata={"format": "pt"})
    return sorted(made)


def rename(folder: Path, change: Callable[[str], str]) -> None:
    path = folder / "model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def plan(folder: Path, **options: Any) -> Plan:
    return Plan(Checkpoint(folder), name="m", **options)


def test_a_bert_tagger_with_pooler_and_position_ids_is_the_same_model(tmp_path: Path) -> None:
    labels = {0: "O", 1: "B-PER", 2: "I-PER"}
    folder = task_checkpoints.bert(tmp_path / "ner", "TokenClassification", num_hidden_layers=2, id2label=labels)
    rename(folder, lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"))
    positions = {"bert.embeddings.position_ids": torch.arange(128)[None]}
    added = add(folder, POOLER | NEXT_SENTENCE, **positions)
    change_config(folder, _num_labels=3, output_past=True, max_length=20)
    notes: list[Progress] = []
    served = published(folder, tmp_path, progress=lambda said: notes.append(said) if said.stage == "note" else None)
    ids = torch.arange(5, 40)
    expected = reference(folder, "BertForTokenClassification")(ids[None]).logits[0]
    assert torch.allclose(Session(served.cut(1), 128).step(ids), expected, atol=1e-5)
    assert served.manifest.labels == ("O", "B-PER", "I-PER")
    said = " ".join(note.detail for note in notes)
    assert f"{len(added)} tensors" in said
    assert "_num_labels, output_past, max_length" in said


def test_masks_that_gpt2_once_stored_are_left_out(tmp_path: Path) -> None:
    folder = checkpoints.gpt2(tmp_path / "checkpoint", n_layer=1)
    rename(folder, lambda name: name.removeprefix("transformer."))
    masks = {"h.0.attn.bias": torch.ones(1, 1, 1024, 1024), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    assert list(plan(folder).weights.left_out) == []
    assert list(plan_with(folder, masks).weights.left_out) == sorted(masks)


def plan_with(folder: Path, more: dict[str, torch.Tensor]) -> Plan:
    add(folder, {}, **more)
    return plan(folder)


def test_a_distilbert_classifier_may_still_hold_the_head_it_was_trained_with(tmp_path: Path) -> None:
    folder = task_checkpoints.classifier(tmp_path / "sst2", "DistilBert", "SequenceClassification")
    added = add(
        folder, {"vocab_transform.weight": (48, 48), "vocab_layer_norm.bias": (48,), "vocab_projector.bias": (340,)}
    )
    assert list(plan(folder).weights.left_out) == added


@pytest.mark.parametrize("name", ["bert.pooler.dense.weight", "bert.pooler.strange.weight", "encoder.layer.7.x"])
def test_a_tensor_that_no_class_has_in_that_shape_is_refused(tmp_path: Path, name: str) -> None:
    folder = task_checkpoints.bert(tmp_path / "m", "TokenClassification", num_hidden_layers=1)
    add(folder, {name: (WIDTH, WIDTH + 1)})
    with pytest.raises(ManifestError, match=name):
        plan(folder)


def pretrained(folder: Path) -> Path:
    task_checkpoints.bert(folder, "MaskedLM", num_hidden_layers=1)
    add(folder, POOLER | NEXT_SENTENCE)
    change_config(folder, architectures=["BertForPreTraining"])
    return folder


def test_a_class_that_is_not_served_is_refused_with_those_that_its_weights_make(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "m")
    with pytest.raises(ManifestError, match="BertForPreTraining") as refused:
        plan(folder)
    assert "BertForMaskedLM (fill-mask), BertModel (feature-extraction)" in refused.value.message
    assert "--architecture BertForMaskedLM" in refused.value.message
    assert plan(folder, architecture="BertForMaskedLM").task == "fill-mask"
    assert plan(folder, architecture="BertModel").task == "feature-extraction"
    with pytest.raises(ManifestError, match="BertModel"):
        plan(folder, architecture="BertForTokenClassification")


def test_a_head_that_the_checkpoint_does_not_hold_is_refused_with_what_it_does_hold(tmp_path: Path) -> None:
    folder = checkpoints.bert(tmp_path / "m", num_hidden_layers=1)
    change_config(folder, architectures=["BertForMaskedLM"])
    with pytest.raises(ManifestError, match=r"lacks cls.*choose one with --architecture BertModel"):
        plan(folder)


def test_sentence_transformers_mean_the_base_model_whatever_it_was_trained_as(tmp_path: Path) -> None:
    folder = checkpoints.bert(tmp_path / "m", num_hidden_layers=1)
    change_config(folder, architectures=["BertForMaskedLM"])
    (folder / "modules.json").write_text(json.dumps([{"path": "", "type": "s.Transformer"}]))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    assert plan(folder).architecture == "BertModel"


@pytest.mark.parametrize("named", [None, [], ["BertModel", "BertForMaskedLM"]])
def test_a_config_that_does_not_name_one_class_is_refused_with_what_its_weights_make(
    tmp_path: Path, named: Any
) -> None:
    folder = checkpoints.bert(tmp_path / "m", num_hidden_layers=1)
    change_config(folder, architectures=named)
    with pytest.raises(ManifestError, match=r"architectures.*--architecture BertModel"):
        plan(folder)


def test_heads_as_wide_as_the_config_says_though_its_class_has_no_such_field(tmp_path: Path) -> None:
    sizes = {**checkpoints.SMALL, **checkpoints.ENDS, "num_hidden_layers": 1, "head_dim": 20}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = transformers.Qwen3MoeConfig(**sizes, **experts)
    folder = checkpoints.save(transformers.Qwen3MoeForCausalLM, config, tmp_path / "checkpoint", 0)
    ids = torch.arange(30)
    expected = reference(folder, "Qwen3MoeForCausalLM")(ids[None]).logits[0]
    assert torch.allclose(Session(published(folder, tmp_path).cut()).step(ids), expected, atol=1e-5, rtol=1e-4)
