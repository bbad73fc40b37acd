"""Heads, stacks and streams beyond one decoder: what a span returns equals what transformers' whole model returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from census.configs import entries, tiny_config
from harness.checkpoints import BERT, ENDS, SMALL, Published, Session, published, reference, save
from tallystick_model.anatomy import dissect
from tallystick_model.config import checkpoint_config
from tallystick_model.publishing.rehearsal import rehearse
from tallystick_model.segments import Segment
from tallystick_model.skeleton import build_skeleton
from tallystick_protocol.errors import BadTensor, ManifestError

IDS = torch.arange(20, 37)
LABELS = {0: "cold", 1: "warm", 2: "hot"}
T5 = {"vocab_size": 320, "d_model": 72, "d_kv": 12, "d_ff": 100, "num_layers": 3, "num_heads": 6, **ENDS}
BART = {
    "vocab_size": 320, "d_model": 72, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 6,
    "decoder_attention_heads": 6, "encoder_ffn_dim": 100, "decoder_ffn_dim": 100, "max_position_embeddings": 256,
    "decoder_start_token_id": 1, "pad_token_id": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def through(spans: list[Any], ids: torch.Tensor, wanted: list[int] | None = None) -> torch.Tensor:
    rows = ids
    for span in spans:
        rows = span.forward([Segment(span.new_cache(64), 0, rows, wanted=wanted)])[0]
    return rows


CLASSIFIERS = {
    "bert label": ("BertForSequenceClassification", transformers.BertConfig, BERT, "label"),
    "roberta label": ("RobertaForSequenceClassification", transformers.RobertaConfig, BERT, "label"),
    "distilbert label": (
        "DistilBertForSequenceClassification", transformers.DistilBertConfig,
        {"vocab_size": 320, "dim": 72, "n_layers": 3, "n_heads": 6, "hidden_dim": 100, "max_position_embeddings": 512},
        "label",
    ),
    "llama label": ("LlamaForSequenceClassification", transformers.LlamaConfig, SMALL | {"pad_token_id": 1}, "label"),
    "bert tokens": ("BertForTokenClassification", transformers.BertConfig, BERT, "scores"),
    "llama tokens": ("LlamaForTokenClassification", transformers.LlamaConfig, SMALL, "scores"),
    "bert answers": ("BertForQuestionAnswering", transformers.BertConfig, BERT, "scores"),
}  # fmt: skip


@pytest.mark.parametrize("what", sorted(CLASSIFIERS))
def test_a_classifier_in_spans_gives_the_scores_of_the_whole(tmp_path: Path, what: str) -> None:
    name, config, sizes, output = CLASSIFIERS[what]
    labels = {} if name.endswith("Answering") else {"id2label": LABELS}
    folder = save(getattr(transformers, name), config(**sizes, **labels), tmp_path / "checkpoint", 0)
    served = published(folder, tmp_path)
    manifest = served.manifest
    assert (manifest.output, manifest.labels) == (
        output, ("start", "end") if name.endswith("Answering") else ("cold", "warm", "hot"),
    )  # fmt: skip
    whole = reference(folder, name)
    with torch.no_grad():
        answer = whole(input_ids=IDS[None])
    if name.endswith("Answering"):
        expected = torch.stack([answer.start_logits[0], answer.end_logits[0]], dim=1)
    else:
        expected = answer.logits if output == "label" else answer.logits[0]
    last = [len(IDS) - 1] if output == "label" else None
    assert torch.equal(through(served.cut(2, execution="stock"), IDS, last), expected)
    canonical = through(served.cut(2), IDS, last)
    assert canonical.shape == expected.shape
    assert float((canonical - expected).abs().max()) < 1e-4
    if output == "label":
        assert through(served.cut(2), IDS, [3]).shape == (0, 3)


def answers(served: Published, memory_ids: torch.Tensor, ids: torch.Tensor, execution: Any) -> torch.Tensor:
    """The decoder's logits for each step of `ids`, over an encoder cut in two and a decoder cut in two."""
    cut = served.manifest.encoder_layers
    spans = served.cut(1, cut, cut + 1, execution=execution)
    memory = through(spans[:2], memory_ids)
    caches = [span.new_cache(64, memory) for span in spans[2:]]
    out, at = [], 0
    for chunk in ids.split([5, 1, 1]):
        rows = chunk
        for span, cache in zip(spans[2:], caches, strict=True):
            rows = span.forward([Segment(cache, at, rows)])[0]
        out.append(rows)
        at += len(chunk)
    return torch.cat(out)


@pytest.mark.parametrize("what", ["t5", "bart"])
def test_an_encoder_decoder_is_two_routes_with_a_memory_between(tmp_path: Path, what: str) -> None:
    config = transformers.T5Config(**T5) if what == "t5" else transformers.BartConfig(**BART)
    name = {"t5": "T5ForConditionalGeneration", "bart": "BartForConditionalGeneration"}[what]
    folder = save(getattr(transformers, name), config, tmp_path / "checkpoint", 0)
    served = published(folder, tmp_path)
    assert (served.manifest.encoder_layers, served.manifest.layers) == (3, 6)
    ids = torch.arange(40, 47)
    with torch.no_grad():
        whole = reference(folder, name)(input_ids=IDS[None], decoder_input_ids=ids[None]).logits[0]
    for execution in ("stock", "canonical"):
        assert float((answers(served, IDS, ids, execution) - whole).abs().max()) < 1e-4 * float(whole.std())
    decoder = served.cut(1, 3, execution="stock")[2]
    with pytest.raises(BadTensor, match="encoder"):
        decoder.new_cache(8)


def test_t5s_position_bias_is_shared_and_grafted() -> None:
    config = checkpoint_config(transformers.T5Config(**T5).to_dict())
    anatomy = dissect(build_skeleton(config, "T5ForConditionalGeneration"))
    biases = [name for name in anatomy.weights_of("shared") if "relative_attention_bias" in name]
    assert len(biases) == 2
    assert set(biases) <= anatomy.grafts.keys()
    assert anatomy.encoder_layers == 3


def test_albert_runs_one_layer_again_and_again() -> None:
    config = transformers.AlbertConfig(
        vocab_size=320, hidden_size=72, embedding_size=24, num_hidden_layers=5, num_attention_heads=6,
        intermediate_size=100,
    )  # fmt: skip
    anatomy = dissect(build_skeleton(checkpoint_config(config.to_dict()), "AlbertForMaskedLM"))
    assert len(anatomy.layers) == 5
    assert not anatomy.weights_of("layer.0")


def test_a_model_that_mixes_its_layers_is_refused_before_it_is_published() -> None:
    config = transformers.XLMConfig(vocab_size=320, emb_dim=72, n_layers=3, n_heads=6, max_position_embeddings=128)
    with pytest.raises(ManifestError, match="cannot be cut into spans"):
        rehearse(checkpoint_config(config.to_dict()), "XLMWithLMHeadModel")


def test_a_rehearsal_runs_a_small_copy_of_a_large_model() -> None:
    config = transformers.LlamaConfig(num_hidden_layers=3)
    rehearse(checkpoint_config(config.to_dict()), "LlamaForCausalLM")


@pytest.mark.parametrize("name", ["zamba2:causal", "gemma3n_text:causal"])
def test_what_else_follows_the_tokens_crosses_in_the_rows(tmp_path: Path, name: str) -> None:
    entry = next(entry for entry in entries() if entry.name == name)
    config = tiny_config(entry)
    folder = save(getattr(transformers, entry.architecture), config, tmp_path / "checkpoint", 0)
    served = published(folder, tmp_path)
    assert served.manifest.width > config.hidden_size
    session = Session(served.cut(2, execution="stock"), 64)
    with torch.no_grad():
        whole = reference(folder, entry.architecture)(input_ids=IDS[None]).logits[0]
    assert torch.equal(session.step(IDS), whole)
    if name.startswith("zamba2"):
        with pytest.raises(RuntimeError, match="rolled back"):
            session.crop(3)
