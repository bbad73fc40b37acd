"""Text to token ids and back, with the tokenizer that the manifest pins."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from tallystick_protocol.errors import ConfigError, ManifestError

MAX_TEXT = 1 << 20
_CUT = "\ufffd"


class Tokens:
    """A model's tokenizer."""

    def __init__(self, path: Path) -> None:
        """path: a tokenizer.json. Raises ManifestError when the tokenizers library does not take it."""
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise ManifestError(f"the model's tokenizer cannot be read: {str(error)[:120]}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str) -> list[int]:
        """Ids with the tokenizer's own special tokens around. Raises ConfigError for text that is too long or empty."""
        if len(text) > MAX_TEXT:
            raise ConfigError(f"the text has {len(text)} characters, {MAX_TEXT} is the limit")
        try:
            ids: list[int] = self._tokenizer.encode(text).ids
        except (TypeError, UnicodeError):
            raise ConfigError("the text is not valid Unicode") from None
        if not ids:
            raise ConfigError("the prompt is empty: give it at least one token")
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens left out."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


class TextStream:
    """Turns ids into text as they come: what may still change (half a character) is held back."""

    def __init__(self, tokens: Tokens, prompt: list[int]) -> None:
        self._tokens = tokens
        self._prompt = prompt
        self._ids: list[int] = []
        self._skip = len(tokens.decode(prompt))
        self._given = 0

    @property
    def text(self) -> str:
        """Everything generated so far."""
        return self._tokens.decode(self._prompt + self._ids)[self._skip :]

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
