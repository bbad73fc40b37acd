"""Text in and out: bounded, streamed without half characters, taken back exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Whitespace

from tallystick.tokens import MAX_TEXT, TextStream, Tokens
from tallystick_protocol.errors import ConfigError, ManifestError

TEXT = "naïve 😀 end\n"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """One token per byte."""
    letters = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=100)
    path = tmp_path_factory.mktemp("tokens") / "tokenizer.json"
    tokenizer.save(str(path))
    return Tokens(path)


def test_text_comes_back_and_neither_truncation_nor_padding_of_the_file_holds(tokens: Tokens) -> None:
    assert len(tokens.encode(TEXT)) == len(TEXT.encode())
    assert tokens.decode(tokens.encode(TEXT)) == TEXT


def test_a_stream_gives_every_character_once_and_no_half_ones(tokens: Tokens) -> None:
    stream = TextStream(tokens, tokens.encode("prompt "))
    pieces = [stream.push(token) for token in tokens.encode(TEXT)]
    assert "".join(pieces) == TEXT == stream.text
    assert "\ufffd" not in "".join(pieces)
    assert pieces[7:11] == ["", "", "", "😀"]


def test_special_tokens_are_no_text(tokens: Tokens) -> None:
    stream = TextStream(tokens, [])
    end = tokens.encode("<end>")
    assert len(end) == 1
    assert stream.push(end[0]) == ""
    assert stream.push(tokens.encode("a")[0]) == "a"


def test_bytes_that_never_become_a_character_are_shown_when_that_is_certain(tokens: Tokens) -> None:
    stream = TextStream(tokens, [])
    broken = tokens.encode("é")[0]
    assert stream.push(broken) == ""
    assert stream.push(tokens.encode("x")[0]) == "\ufffdx"


@pytest.mark.parametrize("num_tokens", range(len(TEXT.encode()) + 1))
def test_what_is_retracted_and_generated_again_leaves_the_same_text(tokens: Tokens, num_tokens: int) -> None:
    ids = tokens.encode(TEXT)
    stream = TextStream(tokens, tokens.encode("p"))
    shown = "".join(stream.push(token) for token in ids)
    removed = stream.retract(num_tokens)
    shown = shown[: len(shown) - removed]
    assert TEXT.startswith(shown)
    assert "\ufffd" not in shown
    shown += "".join(stream.push(token) for token in ids[len(ids) - num_tokens :])
    assert shown == TEXT


def test_half_a_character_that_is_retracted_takes_the_whole_one_back(tokens: Tokens) -> None:
    stream = TextStream(tokens, [])
    e_acute, e_grave = tokens.encode("é"), tokens.encode("è")
    assert [stream.push(token) for token in e_acute] == ["", "é"]
    assert stream.retract(1) == 1
    assert stream.push(e_grave[1]) == "è"
    assert stream.text == "è"


def test_more_can_be_retracted_than_there_is(tokens: Tokens) -> None:
    stream = TextStream(tokens, [])
    for token in tokens.encode("abc"):
        stream.push(token)
    assert stream.retract(10) == 3
    assert stream.text == ""
    assert stream.retract(1) == 0


def test_text_that_is_too_long_is_refused_before_it_is_tokenized(tokens: Tokens) -> None:
    with pytest.raises(ConfigError, match="is the limit"):
        tokens.encode("a" * (MAX_TEXT + 1))


@pytest.mark.parametrize("text", ["", "\ud800"], ids=["empty", "a surrogate"])
def test_text_that_is_none_is_a_config_error(tokens: Tokens, text: str) -> None:
    with pytest.raises(ConfigError):
        tokens.encode(text)


def test_a_prompt_that_becomes_no_token_is_a_config_error(tmp_path: Path) -> None:
    tokenizer = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "t.json"))
    with pytest.raises(ConfigError, match="empty"):
        Tokens(tmp_path / "t.json").encode("   \n ")


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"version":"1.0","model":{"type":"BPE"}}',
     b'{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,"pre_tokenizer":{"type":"Split",'
     b'"pattern":{"Regex":"("},"behavior":"Isolated","invert":false},"post_processor":null,"decoder":null,'
     b'"model":{"type":"WordLevel","vocab":{},"unk_token":"a"}}'],
    ids=lambda content: repr(content[:20]),
)  # fmt: skip
def test_a_tokenizer_that_the_library_refuses_is_a_manifest_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ManifestError, match="tokenizer"):
        Tokens(tmp_path / "tokenizer.json")
    with pytest.raises(ManifestError, match="tokenizer"):
        Tokens(tmp_path / "missing.json")


def bert_like(folder: Path, settings: object) -> Tokens:
    """A word tokenizer with a mask, and a tokenizer_config.json."""
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "[MASK]": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(["[UNK]", "[MASK]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokens(folder / "tokenizer.json", folder / "tokenizer_config.json")


@pytest.mark.parametrize(
    "settings, mask",
    [({"mask_token": "b"}, "b"), ({"mask_token": {"content": "a", "lstrip": True}}, "a"), ({}, "[MASK]"),
     ({"mask_token": "<not in the vocabulary>"}, "[MASK]"), ({"mask_token": 7}, "[MASK]")],
    ids=str,
)  # fmt: skip
def test_a_special_token_is_the_one_the_files_name_or_the_usual_one(
    tmp_path: Path, settings: dict[str, object], mask: str
) -> None:
    assert bert_like(tmp_path, settings).special_token("mask") == mask


def test_a_chat_template_is_a_file_of_its_own_or_a_setting_of_several_the_default(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert bert_like(tmp_path, {"chat_template": named}).chat_template == "D"
    assert bert_like(tmp_path, {"chat_template": "S"}).chat_template == "S"
    assert bert_like(tmp_path, {"chat_template": 3}).chat_template is None
    (tmp_path / "chat_template.jinja").write_text("F")
    tokens = Tokens(tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json", tmp_path / "chat_template.jinja")
    assert tokens.chat_template == "F"


def test_settings_that_are_no_object_are_a_manifest_error(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="tokenizer_config"):
        bert_like(tmp_path, ["mask_token"])


def test_windows_overlap_cover_the_text_and_leave_the_tokenizer_as_it_was(tmp_path: Path) -> None:
    tokens = bert_like(tmp_path, {})
    text = " ".join("ab" * 20)
    windows = tokens.windows(text, None, 16, 4)
    assert [len(window.ids) for window in windows] == [16, 16, 16]
    assert windows[0].offsets[-4:] == windows[1].offsets[:4]
    assert {offset for window in windows for offset in window.offsets} == set(tokens.analyse(text).offsets)
    with pytest.raises(ConfigError, match="windows of 4 tokens"):
        tokens.windows(text, None, 4, 4)
    assert len(tokens.encode(text)) == 40
