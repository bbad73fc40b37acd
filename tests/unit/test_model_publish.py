"""Publishing: the same checkpoint gives the same manifest, and what cannot be served exactly is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness import checkpoints
from harness.checkpoints import Session, add_companions, change_config, published
from tallystick_protocol.errors import ManifestError
from tallystick_protocol.manifest import Manifest, Pooling


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    return checkpoints.llama(tmp_path / "checkpoint", num_hidden_layers=2)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_the_same_checkpoint_gives_the_same_manifest(folder: Path, tmp_path: Path) -> None:
    one, two = published(folder, tmp_path / "one"), published(folder, tmp_path / "two")
    assert one.manifest.to_bytes() == two.manifest.to_bytes()
    assert Manifest.from_bytes(one.store.get_block(one.manifest.cid)) == one.manifest
    assert (one.manifest.name, one.manifest.licence, one.manifest.generation["eos"]) == ("checkpoint", "cc0-1.0", [1])
    assert set(one.manifest.tokenizer) == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}


def test_a_sharded_bf16_checkpoint_keeps_its_dtype_and_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    whole = checkpoints.llama(tmp_path / "whole", num_hidden_layers=2, dtype=torch.bfloat16)
    shards = tmp_path / "shards"
    checkpoints.reference(whole, "LlamaForCausalLM").to(torch.bfloat16).save_pretrained(shards, max_shard_size="100KB")
    add_companions(shards)
    assert (shards / "model.safetensors.index.json").exists()
    one, two = published(whole, tmp_path / "a", name="m"), published(shards, tmp_path / "b", name="m")
    assert one.manifest == two.manifest
    assert {spec.dtype for piece in one.manifest.pieces for spec in piece.tensors.values()} == {"BF16"}


def test_a_tied_embedding_is_stored_once_even_if_the_checkpoint_has_it_twice(tmp_path: Path) -> None:
    folder = checkpoints.llama(tmp_path / "checkpoint", num_hidden_layers=2, tie_word_embeddings=True)
    once = published(folder, tmp_path / "a").manifest
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert published(folder, tmp_path / "b").manifest == once
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ManifestError, match="two values"):
        published(folder, tmp_path / "c")


def test_a_base_model_without_its_prefix_is_found(tmp_path: Path) -> None:
    folder = checkpoints.gpt2(tmp_path / "checkpoint")
    expected = published(folder, tmp_path / "a").manifest
    rewrite(folder, lambda t: [t.update({name.removeprefix("transformer."): t.pop(name)}) for name in list(t)])
    assert published(folder, tmp_path / "b").manifest == expected


def test_sentence_embeddings_say_how_they_are_pooled(tmp_path: Path) -> None:
    folder = checkpoints.bert(tmp_path / "checkpoint", num_hidden_layers=2)
    assert published(folder, tmp_path / "a").manifest.pooling == Pooling("mean", True)
    kinds = ("Transformer", "Pooling")
    (folder / "modules.json").write_text(
        json.dumps([{"path": "1_Pooling" if k == "Pooling" else "", "type": f"s.{k}"} for k in kinds])
    )
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        '{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}'
    )
    assert published(folder, tmp_path / "b").manifest.pooling == Pooling("cls", False)
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(ManifestError, match="max_tokens"):
        published(folder, tmp_path / "c")


def test_norms_have_room_for_every_honest_row(folder: Path, tmp_path: Path) -> None:
    served = published(folder, tmp_path)
    rows = Session(served.cut(1)[:1]).step(torch.randint(0, 320, (200,)))
    low, high = served.manifest.norms[1]
    assert bool(((rows.norm(dim=1) > 4 * low) & (rows.norm(dim=1) < high / 4)).all())


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "only pickles": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "safetensors"),
    "remote code": (lambda f: change_config(f, auto_map={"AutoModel": "x.Y"}), "auto_map"),
    "kernels": (lambda f: change_config(f, _attn_implementation="evil/kernel"), "_attn_implementation"),
    "unknown key": (lambda f: change_config(f, warp_drive=1), "warp_drive"),
    "unknown type": (lambda f: change_config(f, model_type="warp"), "model_type"),
    "two architectures": (lambda f: change_config(f, architectures=["A", "B"]), "architectures"),
    "missing tensor": (lambda f: rewrite(f, lambda t: t.pop("model.norm.weight")), "lacks model.norm.weight"),
    "extra tensor": (lambda f: rewrite(f, lambda t: t.update(x=torch.zeros(1))), "holds x"),
    "nan": (lambda f: rewrite(f, lambda t: t["model.norm.weight"].fill_(torch.nan)), "NaN"),
    "transposed": (
        lambda f: rewrite(f, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].t().contiguous()})),
        "shape",
    ),
    "vocab": (lambda f: change_config(f, vocab_size=400), "shape"),
    "integers": (
        lambda f: rewrite(f, lambda t: t.update({"model.norm.weight": torch.ones(72, dtype=torch.int8)})),
        "I8",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "bad tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    "tokenizer code": (lambda f: (f / "tokenizer_config.json").write_text('{"auto_map": {}}'), "auto_map"),
    "no end": (
        lambda f: ((f / "generation_config.json").unlink(), change_config(f, eos_token_id=None)),
        "eos_token_id",
    ),
    "end out of range": (lambda f: (f / "generation_config.json").write_text('{"eos_token_id": 320}'), "320"),
    "no licence": (lambda f: (f / "README.md").unlink(), "licence"),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        "safetensors",
    ),
    "json": (lambda f: (f / "config.json").write_text("{"), "JSON"),
}


@pytest.mark.parametrize("what", sorted(REFUSED))
def test_what_cannot_be_served_exactly_is_refused(folder: Path, tmp_path: Path, what: str) -> None:
    spoil, message = REFUSED[what]
    spoil(folder)
    with pytest.raises(ManifestError, match=message):
        published(folder, tmp_path)


def test_a_tokenizer_with_more_ids_than_rows_is_refused(tmp_path: Path) -> None:
    folder = checkpoints.llama(tmp_path / "checkpoint", num_hidden_layers=2, vocab_size=200)
    with pytest.raises(ManifestError, match="tokenizer"):
        published(folder, tmp_path)
