"""Checkpoints with SentencePiece's files alone: the tokenizer.json that is made of them gives the same ids."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import sentencepiece
import torch
import transformers
from tokenizers import Tokenizer

from harness.checkpoints import published
from harness.task_checkpoints import SENTENCES, SEQ2SEQ_SMALL
from tallystick.tasks.languages import source_ids, target_code
from tallystick.tokens import Tokens
from tallystick_model.publishing import companions, plan
from tallystick_model.sandbox import conversion
from tallystick_model.sandbox.sentence_pieces import written_out

TARGET = [
    "Ein Kerbholz war eine alte Gedächtnishilfe, um Zahlen, Mengen und Botschaften festzuhalten.",
    "Das geteilte Kerbholz wurde im mittelalterlichen Europa üblich: je eine Hälfte für beide Seiten.",
    "Wer behält die längere Hälfte des Stocks? Der Gläubiger, «Straße» 17.",
]
TEXTS = [
    *SENTENCES, "  two   spaces, and one behind ", "a\ttab\nand a line", "ﬁ ½ Ａ", "", " ", "a</s>b <unk> c", "π", "😀",
    "the Kerbholz, Anna", "1887 1887", "of Berlin ▁ sold",
]  # fmt: skip


def train(lines: list[str], path: Path, size: int, **options: Any) -> list[str]:
    """A SentencePiece model of a few sentences; its pieces."""
    prefix = str(path.with_suffix(""))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=prefix, vocab_size=size, hard_vocab_limit=False, minloglevel=2,
        **options,
    )  # fmt: skip
    shutil.move(f"{prefix}.model", path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return [model.id_to_piece(number) for number in range(3, model.get_piece_size())]


def numbered(folder: Path, first: list[str], pieces: list[str], last: list[str]) -> dict[str, int]:
    """Write a vocab.json: ids of its own, not the model's."""
    ids = {text: number for number, text in enumerate(dict.fromkeys([*first, *reversed(pieces), *last]))}
    (folder / "vocab.json").write_text(json.dumps(ids))
    return ids


def settings(folder: Path, model_type: str, **values: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\n---\n")
    return folder


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Helsinki-NLP's checkpoints are: a model for each side, one vocab.json, language marks, <pad> at the end."""
    folder = tmp_path_factory.mktemp("marian")
    pieces = [*train(SENTENCES, folder / "source.spm", 150), *train(TARGET, folder / "target.spm", 90)]
    numbered(folder, ["</s>", "<unk>"], pieces, [">>deu<<", ">>nld<<", "<pad>"])
    return settings(
        folder, "marian", tokenizer_class="MarianTokenizer", source_lang="en", target_lang="de", model_max_length=512
    )


@pytest.fixture(scope="module")
def m2m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("m2m")
    pieces = train(SENTENCES, folder / "sentencepiece.bpe.model", 150)
    numbered(folder, ["<s>", "<pad>", "</s>", "<unk>"], pieces, [])
    return settings(folder, "m2m_100", tokenizer_class="M2M100Tokenizer")


@pytest.mark.filterwarnings("ignore:Recommended")
@pytest.mark.parametrize("name", ["marian", "m2m"])
def test_the_ids_are_those_of_the_checkpoints_own_tokenizer(name: str, request: pytest.FixtureRequest) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(request.getfixturevalue(name))
    ours = written_out(theirs)
    known = set(theirs.encoder)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text).ids == ids, text
        if not known.isdisjoint(theirs.convert_ids_to_tokens(ids)) and "unk" not in text:
            decoded = theirs.decode(ids, skip_special_tokens=True).replace("__en__", "")
            assert ours.decode(ids).strip() == decoded.strip()


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize(
    "name, file, options",
    [
        ("plbart", "sentencepiece.bpe.model", {"tokenizer_class": "PLBartTokenizer"}),
        (
            "plbart", "sentencepiece.bpe.model",
            {"tokenizer_class": "PLBartTokenizer", "language_codes": "multi", "src_lang": "java", "tgt_lang": "en_XX"},
        ),
        ("bert-generation", "spiece.model", {"tokenizer_class": "BertGenerationTokenizer"}),
    ],
    ids=["plbart", "plbart-multi", "bert-generation"],
)  # fmt: skip
def test_ids_without_a_vocab_json_are_those_of_the_checkpoints_own_tokenizer(
    tmp_path: Path, name: str, file: str, options: dict[str, Any], kind: str
) -> None:
    train(SENTENCES, tmp_path / file, 200 if kind == "bpe" else 150, model_type=kind)
    theirs = transformers.AutoTokenizer.from_pretrained(settings(tmp_path, name, **options))
    ours = written_out(theirs)
    for text in [*SENTENCES, *TEXTS]:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text).ids == ids, text
        if "unk" not in text and theirs.unk_token_id not in ids:
            assert ours.decode(ids).strip() == theirs.decode(ids, skip_special_tokens=True).strip()


def test_plbarts_languages_are_marked_as_its_own_tokenizer_does(tmp_path: Path) -> None:
    train(SENTENCES, tmp_path / "sentencepiece.bpe.model", 150)
    folder = settings(tmp_path, "plbart", tokenizer_class="PLBartTokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    written_out(theirs).save(str(tmp_path / "tokenizer.json"))
    tokens = Tokens(tmp_path / "tokenizer.json")
    theirs.src_lang = "java"
    assert source_ids(tokens, "the stick", "java", "en_XX") == theirs("the stick")["input_ids"]
    assert target_code(tokens, "en_XX") == theirs.convert_tokens_to_ids("__en_XX__")


def test_pieces_that_sentencepiece_takes_out_first_are_refused(tmp_path: Path) -> None:
    train(SENTENCES, tmp_path / "spiece.model", 160, user_defined_symbols=["half"])
    folder = settings(tmp_path, "bert-generation", tokenizer_class="BertGenerationTokenizer")
    with pytest.raises(ValueError, match=r"gives ids that no tokenizer\.json would"):
        written_out(transformers.AutoTokenizer.from_pretrained(folder))


@pytest.mark.filterwarnings("ignore:Recommended")
def test_language_marks_are_tokens_that_an_answer_does_not_show(marian: Path, m2m: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(marian)
    ours = written_out(theirs)
    assert ours.encode(">>deu<< a stick").ids == theirs(">>deu<< a stick")["input_ids"]
    assert "deu" not in ours.decode(ours.encode(">>deu<< a stick").ids)
    theirs = transformers.AutoTokenizer.from_pretrained(m2m)
    ours = written_out(theirs)
    assert {text: ours.token_to_id(text) for text in ("__fr__", "__de__")} == {
        text: theirs.get_lang_id(text.strip("_")) for text in ("__fr__", "__de__")
    }
    theirs.src_lang = "fr"
    assert written_out(theirs).encode("a stick").ids == theirs("a stick")["input_ids"]


@pytest.mark.filterwarnings("ignore:Recommended")
def test_what_would_give_other_ids_is_refused(marian: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(marian, folder)
    ids = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({text: number * 2 for text, number in ids.items()}))
    with pytest.raises(ValueError, match=r"ids of its vocab\.json"):
        written_out(transformers.AutoTokenizer.from_pretrained(folder))
    lacks = next(text for text in ids if text.startswith("▁") and len(text) > 3)  # a piece that the source uses
    kept = [text for text in ids if text != lacks]
    (folder / "vocab.json").write_text(json.dumps({text: number for number, text in enumerate(kept)}))
    with pytest.raises(ValueError, match=r"gives ids that no tokenizer\.json would"):
        written_out(transformers.AutoTokenizer.from_pretrained(folder))


def convert(folder: Path, out: Path) -> None:
    """The conversion in this process, for importing transformers anew takes seconds."""
    conversion.convert({"folder": str(folder), "out": str(out), "gguf": None})


@pytest.mark.parametrize(
    "name, file, tokenizer_class",
    [("t5", "spiece.model", "T5Tokenizer"), ("deberta-v2", "spm.model", "DebertaV2Tokenizer")],
)
def test_what_transformers_converts_needs_no_package_of_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, file: str, tokenizer_class: str
) -> None:
    train(SENTENCES, tmp_path / file, 150)
    settings(tmp_path, name, tokenizer_class=tokenizer_class)
    monkeypatch.setattr(companions, "convert_tokenizer", convert)
    made = Tokenizer.from_file(str(companions._made(cast(Any, SimpleNamespace(folder=tmp_path)), tmp_path / "scratch")))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / file))
    for text in SENTENCES[:4]:
        assert made.encode(text, add_special_tokens=False).tokens == theirs.encode(text, out_type=str)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:Recommended")
def test_a_marian_folder_as_it_is_downloaded_is_published(
    marian: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(companions, "convert_tokenizer", convert)
    monkeypatch.setattr(plan, "rehearse", lambda *_: None)  # tests/integration/test_tasks.py rehearses one
    folder = tmp_path / "checkpoint"
    shutil.copytree(marian, folder)
    size = len(json.loads((folder / "vocab.json").read_text()))
    sizes = {**SEQ2SEQ_SMALL, "vocab_size": size, "decoder_vocab_size": size, "pad_token_id": size - 1}
    torch.manual_seed(0)
    config = transformers.MarianConfig(**{**sizes, "eos_token_id": 0, "decoder_start_token_id": size - 1})
    transformers.MarianMTModel(config).save_pretrained(folder)
    served = published(folder, tmp_path)
    ref = served.manifest.tokenizer["tokenizer.json"]
    served.store.read_file(ref.cid, tmp_path / "made.json", ref.bytes)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    made = Tokenizer.from_file(str(tmp_path / "made.json"))
    assert made.encode(SENTENCES[2]).ids == theirs(SENTENCES[2])["input_ids"]
