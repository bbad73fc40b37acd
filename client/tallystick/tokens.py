"""Text to token ids and back, with the tokenizer that the manifest pins."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tallystick_protocol.errors import ConfigError, ManifestError

MAX_TEXT = 1 << 20
_CUT = "\ufffd"


@dataclass(frozen=True, slots=True)
class Encoding:
    """A text, or a pair of texts, as a model is given it; all lists are of one length.

    types: segment numbers (token_type_ids). offsets: [start, end) in characters of the text that a token is of.
    special: 1 for tokens that stand for no text. texts: 0 or 1, which text a token is of, None for special ones.
    words: which word of its text a token is of, None for special ones.
    """

    ids: list[int]
    types: list[int]
    offsets: list[tuple[int, int]]
    special: list[int]
    texts: list[int | None]
    words: list[int | None]


class Tokens:
    """A model's tokenizer."""

    def __init__(self, path: Path, settings: Path | None = None, template: Path | None = None) -> None:
        """path: a tokenizer.json; settings: a tokenizer_config.json; template: a chat_template.jinja.

        Raises ManifestError when the tokenizers library does not take it, or the settings are no JSON object.
        """
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise ManifestError(f"the model's tokenizer cannot be read: {str(error)[:120]}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.settings: dict[str, Any] = {} if settings is None else _read_settings(settings)
        self._cleans_up = type(self._tokenizer.model).__name__ != "BPE"
        self._template = None if template is None else template.read_text("utf-8", errors="replace")
        self._added = {token.content: number for number, token in self._tokenizer.get_added_tokens_decoder().items()}

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids with the tokenizer's own special tokens around (or, with special=False, without them).

        Raises ConfigError for text that is too long, or becomes no token.
        """
        ids: list[int] = self._encode(text, None, special).ids
        if not ids:
            raise ConfigError("the prompt is empty: give it at least one token")
        return ids

    def analyse(self, text: str, pair: str | None = None) -> Encoding:
        """A text, or a pair, with special tokens and all that is known of each token. Raises ConfigError."""
        return _encoding(self._encode(text, pair, True))

    def windows(self, text: str, pair: str | None, length: int, overlap: int) -> list[Encoding]:
        """The same in overlapping windows of at most `length` tokens, special ones included.

        Of a pair the second text is cut, and the first repeated in every window. overlap: how many tokens of the cut
        text two neighbours share. Raises ConfigError where no window of that length can be made.
        """
        strategy = "only_first" if pair is None else "only_second"
        try:
            self._tokenizer.enable_truncation(length, stride=overlap, strategy=strategy)
            encoded = self._encode(text, pair, True)
            return [_encoding(part) for part in (encoded, *encoded.overflowing)]
        except BaseException as error:  # the library panics where a window has no room for the text that is cut
            if isinstance(error, KeyboardInterrupt | SystemExit | ConfigError):
                raise
            raise ConfigError(
                f"windows of {length} tokens with {overlap} shared cannot be made of this text ({str(error)[:80]});"
                " take longer windows, or fewer shared tokens"
            ) from None
        finally:
            self._tokenizer.no_truncation()

    def decode(self, ids: list[int], *, special: bool = False) -> str:
        """Text of ids, special tokens left out unless wanted.

        Spaces before punctuation go where the checkpoint's settings say so (`clean_up_tokenization_spaces`), which
        transformers heeds for every tokenizer but BPE.
        """
        text = self.decode_raw(ids, special=special)
        if self.settings.get("clean_up_tokenization_spaces") is True and self._cleans_up:
            for apart, joined in _JOINED:
                text = text.replace(apart, joined)
        return text

    def decode_raw(self, ids: list[int], *, special: bool = False) -> str:
        """The same, not cleaned up: more ids change nothing but the end of it."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=not special)
        return text

    def join(self, tokens: list[str]) -> str:
        """The text that tokens, as the vocabulary writes them, make."""
        if self._tokenizer.decoder is None:
            return " ".join(tokens)
        text: str = self._tokenizer.decoder.decode(tokens)
        return text

    def matching(self, pattern: re.Pattern[str]) -> list[str]:
        """The tokens of the vocabulary that are of a form."""
        return [token for token in self._tokenizer.get_vocab() if pattern.fullmatch(token)]

    def id_of(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def token_of(self, id: int) -> str:
        """A token as the vocabulary writes it; empty for an id that it has not."""
        return self._tokenizer.id_to_token(id) or ""

    def special_token(self, role: str) -> str | None:
        """The token of a role: "mask", "bos", "eos", "unk", "cls", "sep", "pad"; None when there is none."""
        named = self.settings.get(f"{role}_token")
        named = named.get("content") if isinstance(named, dict) else named
        if isinstance(named, str) and self.id_of(named) is not None:
            return named
        return next((token for token in _USUAL.get(role, ()) if token in self._added), None)

    @property
    def special_tokens(self) -> dict[str, str]:
        """Every role that has a token, as chat templates call them: {"bos_token": "<s>", …}."""
        found = {f"{role}_token": self.special_token(role) for role in _ROLES}
        return {name: token for name, token in found.items() if token is not None}

    @property
    def added(self) -> dict[str, int]:
        """Tokens that were added to the vocabulary, special ones and others, and their ids."""
        return dict(self._added)

    def is_special(self, id: int) -> bool:
        """Whether an id stands for no text."""
        return self.token_of(id) in self._added and self.decode([id]) == ""

    @property
    def marks_subwords(self) -> bool:
        """Whether the vocabulary itself says which tokens go on a word (WordPiece's "##")."""
        return bool(getattr(self._tokenizer.model, "continuing_subword_prefix", None))

    @property
    def max_length(self) -> int | None:
        """The longest text, in tokens, that the checkpoint's files name."""
        said = self.settings.get("model_max_length")
        return said if isinstance(said, int) and 0 < said < 1 << 22 else None

    @property
    def chat_template(self) -> str | None:
        """The template that turns messages into a prompt, if the checkpoint has one."""
        if self._template is not None:
            return self._template
        said = self.settings.get("chat_template")
        if isinstance(said, list):
            said = next(
                (entry.get("template") for entry in said if isinstance(entry, dict) and entry.get("name") == "default"),
                None,
            )
        return said if isinstance(said, str) else None

    def _encode(self, text: str, pair: str | None, special: bool) -> Any:
        size = len(text) + len(pair or "")
        if size > MAX_TEXT:
            raise ConfigError(f"the text has {size} characters, {MAX_TEXT} is the limit")
        try:
            return self._tokenizer.encode(text, pair, add_special_tokens=special)
        except (TypeError, UnicodeError):
            raise ConfigError("the text is not valid Unicode") from None


_JOINED = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
    (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip
"""In this order, as in transformers."""

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_USUAL = {"mask": ("[MASK]", "<mask>"), "unk": ("[UNK]", "<unk>")}
"""For folders without a tokenizer_config.json."""


def _encoding(encoded: Any) -> Encoding:
    return Encoding(
        list(encoded.ids),
        list(encoded.type_ids),
        [(int(start), int(end)) for start, end in encoded.offsets],
        list(encoded.special_tokens_mask),
        list(encoded.sequence_ids),
        list(encoded.word_ids),
    )


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ManifestError("the model's tokenizer_config.json is not a JSON object")
    return settings


class TextStream:
    """Turns ids into text as they come: what may still change (half a character) is held back."""

    def __init__(self, tokens: Tokens, prompt: list[int]) -> None:
        self._tokens = tokens
        self._prompt = prompt
        self._ids: list[int] = []
        self._skip = len(tokens.decode_raw(prompt))
        self._given = 0

    @property
    def text(self) -> str:
        """Everything generated so far."""
        return self._tokens.decode_raw(self._prompt + self._ids)[self._skip :]

    def extend(self, ids: list[int]) -> None:
        """Take ids at once; what they make is in `text`."""
        self._ids += ids

    def push(self, token: int) -> str:
        """The new text that this token makes certain."""
        self._ids.append(token)
        text = self.text
        if text.endswith(_CUT):
            return ""
        new, self._given = text[self._given :], len(text)
        return new

    def retract(self, num_tokens: int) -> int:
        """Take the last tokens back; returns how many characters of given text that removes."""
        del self._ids[max(len(self._ids) - num_tokens, 0) :]
        removed = max(0, self._given - len(self.text.rstrip(_CUT)))  # half a character was never given
        self._given -= removed
        return removed
