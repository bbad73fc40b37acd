"""Publishing: the same checkpoint gives the same manifest, and what cannot be served exactly is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from harness import checkpoints
from harness.checkpoints import Session, add_companions, change_config, published
from tallystick_model.publishing.checkpoint import Checkpoint
from tallystick_model.publishing.licence import find_licence
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
    wrong = {"max_tokens": '{"pooling_mode_max_tokens": true}', "where an object belongs": "[]", "JSON": "{"}
    for message, text in wrong.items():
        (folder / "1_Pooling" / "config.json").write_text(text)
        with pytest.raises(ManifestError, match=message):
            published(folder, tmp_path / "c")
    for outside in ("..", "", "/tmp"):
        (folder / "modules.json").write_text(json.dumps([{"type": "s.Pooling", "path": outside}]))
        with pytest.raises(ManifestError, match="names a folder"):
            published(folder, tmp_path / "c")
    assert not kept(tmp_path / "c" / "store")


def test_norms_have_room_for_every_honest_row(folder: Path, tmp_path: Path) -> None:
    served = published(folder, tmp_path)
    rows = Session(served.cut(1)[:1]).step(torch.randint(0, 320, (200,)))
    low, high = served.manifest.norms[1]
    assert bool(((rows.norm(dim=1) > 4 * low) & (rows.norm(dim=1) < high / 4)).all())


INDEX = "model.safetensors.index.json"


def reframe(
    folder: Path,
    change: Callable[[dict[str, Any]], object] = lambda header: None,
    *,
    length: int | None = None,
    raw: bytes | None = None,
) -> None:
    """Write the safetensors file anew with a changed header."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = raw if raw is not None else json.dumps(header).encode()
    path.write_bytes((length or len(text)).to_bytes(8, "little") + text + content[8 + size :])


def shift(header: dict[str, Any], by: int) -> None:
    """Move the tensor that comes second."""
    name = sorted((key for key in header if key != "__metadata__"), key=lambda key: header[key]["data_offsets"])[1]
    header[name]["data_offsets"] = [offset + by for offset in header[name]["data_offsets"]]


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
    "config of many lists": (
        lambda f: change_config(f, hidden_size=json.loads("[" * 400 + "]" * 400)),
        "nested too deeply",
    ),
    "only a file for another program": (lambda f: (f / "model.safetensors").rename(f / "m.gguf"), "publish that file"),
    "config is no object": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "header of 2 GB": (lambda f: reframe(f, length=1 << 31), "safetensors"),
    "header is no JSON": (lambda f: reframe(f, raw=b"{"), "safetensors"),
    "overlap": (lambda f: reframe(f, lambda header: shift(header, -4)), "safetensors"),
    "hole": (lambda f: reframe(f, lambda header: shift(header, 4)), "safetensors"),
    "wrong type size": (
        lambda f: reframe(f, lambda header: header["model.norm.weight"].update(dtype="F64")),
        "safetensors",
    ),
    "index without map": (lambda f: (f / INDEX).write_text("{}"), "weight_map"),
    "index leaves the folder": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": "../model.safetensors"}}'),
        "names a file",
    ),
    "index promises more": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": "model.safetensors"}}'),
        "promises a",
    ),
    "index names a pickle": (lambda f: (f / INDEX).write_text('{"weight_map": {"a": "a.bin"}}'), "names a file"),
    "hostile template": (
        lambda f: (f / "chat_template.jinja").write_text("{{ 'a' * 10 ** 9 }}" + "{% if %}"),
        "chat template",
    ),
    "template of numbers": (
        lambda f: (f / "tokenizer_config.json").write_text('{"chat_template": 7}'),
        "chat_template",
    ),
    "huge tokenizer": (lambda f: (f / "tokenizer.json").open("ab").truncate(500 << 20), "limit"),
    "huge template": (lambda f: (f / "chat_template.jinja").open("ab").truncate(2 << 20), "limit"),
    "tokenizer settings in a list": (
        lambda f: (f / "tokenizer_config.json").write_text('["auto_map"]'),
        "tokenizer_config.json holds a list where an object belongs",
    ),
    "special tokens in a list": (
        lambda f: (f / "special_tokens_map.json").write_text("[]"),
        "special_tokens_map.json holds a list",
    ),
    "generation settings in a list": (
        lambda f: (f / "generation_config.json").write_text('[{"eos_token_id": 1}]'),
        "generation_config.json holds a list",
    ),
    "template with half a character": (
        lambda f: (f / "tokenizer_config.json").write_text('{"chat_template": "\\ud83d"}'),
        "half a character",
    ),
    "templates without names": (
        lambda f: (f / "tokenizer_config.json").write_text('{"chat_template": [{"name": [], "template": 7}]}'),
        "chat_template is neither",
    ),
    "too many ends": (
        lambda f: (f / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(65))})),
        "at most 64",
    ),
    "a temperature of 400 digits": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": 1, "temperature": 1%s}' % ("0" * 400)),
        "temperature",
    ),
    "more generation settings than a manifest holds": (
        lambda f: (f / "generation_config.json").write_text(
            json.dumps({"eos_token_id": 1, "bad_words_ids": [[7] * 1000] * 1000})
        ),
        "the manifest takes",
    ),
    "tied tables in eight bits": (
        lambda f: (
            change_config(f, tie_word_embeddings=True),
            rewrite(f, lambda t: [t.update({name: torch.zeros(320, 72).to(EIGHT_BITS)}) for name in TABLES]),
        ),
        "is F8_E4M3",
    ),
}
EIGHT_BITS = torch.float8_e4m3fn
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize("what", sorted(REFUSED))
def test_what_cannot_be_served_exactly_is_refused(folder: Path, tmp_path: Path, what: str) -> None:
    spoil, message = REFUSED[what]
    spoil(folder)
    with pytest.raises(ManifestError, match=message):
        published(folder, tmp_path)
    assert what == "nan" or not kept(tmp_path / "store"), "all but the values is looked at before the first piece"


def kept(store: Path) -> list[Path]:
    return [path for part in ("blocks", "files") for path in (store / part).rglob("*") if path.is_file()]


@pytest.mark.parametrize("option", ["name", "licence"])
@pytest.mark.parametrize("text", ["two\nlines", "\ufeffmark", "a" * 201], ids=["lines", "mark", "long"])
def test_a_text_that_no_manifest_holds_is_refused_at_once(folder: Path, tmp_path: Path, option: str, text: str) -> None:
    with pytest.raises(ManifestError, match=f"the {option} .* give a --{option}"):
        published(folder, tmp_path, **{option: text})
    assert not kept(tmp_path / "store")


LICENCES: dict[str, tuple[dict[str, str], str]] = {
    "a mark before the front matter": ({"README.md": "\ufeff---\nlicense: mit\n---\n"}, "mit"),
    "the first of a list": ({"README.md": "---\nlicense:\n  - apache-2.0\n  - mit\n---\n"}, "apache-2.0"),
    "another one with a name": ({"README.md": "---\nlicense: other\nlicense_name: llama3.2\n---\n"}, "llama3.2"),
    "a field left empty": ({"README.md": "---\nlicense:\ntags: x\n---\n", "LICENSE": "MIT License"}, "MIT"),
    "a mark before the text": ({"LICENSE": "\ufeff\n\tThe  Tally\x07 Licence\n"}, "The Tally Licence"),
}


@pytest.mark.parametrize("what", sorted(LICENCES))
def test_a_licence_is_found_where_people_write_it(folder: Path, what: str) -> None:
    (folder / "README.md").unlink()
    files, expected = LICENCES[what]
    for name, text in files.items():
        (folder / name).write_text(text)
    assert find_licence(Checkpoint(folder)) == expected


def test_a_tokenizer_with_more_ids_than_rows_is_refused(tmp_path: Path) -> None:
    folder = checkpoints.llama(tmp_path / "checkpoint", num_hidden_layers=2, vocab_size=200)
    with pytest.raises(ManifestError, match="tokenizer"):
        published(folder, tmp_path)


def test_the_chat_template_and_the_generation_config_are_pinned(folder: Path, tmp_path: Path) -> None:
    templates = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    settings = {"bos_token": "<s>", "chat_template": templates}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    served = published(folder, tmp_path)
    found = {}
    for name, ref in served.manifest.tokenizer.items():
        size = served.store.read_file(ref.cid, tmp_path / name, ref.bytes)
        assert size == ref.bytes
        found[name] = (tmp_path / name).read_bytes()
    assert found["chat_template.jinja"] == b"d"
    assert found["generation_config.json"] == (folder / "generation_config.json").read_bytes()


@pytest.mark.nightly
def test_a_folder_with_a_slow_tokenizer_gets_a_tokenizer_json(tmp_path: Path) -> None:
    folder = checkpoints.gpt2(tmp_path / "checkpoint", n_layer=1)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    before = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(checkpoints.TEXT).ids
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "</s>"})
    )
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n")
    served = published(folder, tmp_path)
    ref = served.manifest.tokenizer["tokenizer.json"]
    served.store.read_file(ref.cid, tmp_path / "made.json", ref.bytes)
    assert Tokenizer.from_file(str(tmp_path / "made.json")).encode(checkpoints.TEXT).ids == before
