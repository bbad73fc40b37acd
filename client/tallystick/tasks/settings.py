"""How a generation goes: a checkpoint's generation settings and what the caller changes about them.

Names and meanings are those of transformers' GenerationConfig, https://huggingface.co/docs/transformers/main_classes/
text_generation. A checkpoint's own settings arrive in `Manifest.generation`, where ids have short names (`eos`, `bos`,
`pad`, `decoder_start`, `forced_bos`, `forced_eos`, `suppress`, `begin_suppress`, `bad_words`); so have they here. A
caller may write them as transformers does, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from tallystick.decoding import MAX_BEAMS
from tallystick.tasks.backend import check_ids
from tallystick.tasks.options import check
from tallystick_protocol.errors import ConfigError
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.sampling import Sampling

MAX_NEW_TOKENS = 1 << 20
DEFAULT_NEW_TOKENS = 20
"""What transformers generates when neither the caller nor the checkpoint says how much."""

_GREEDY = Sampling()
_ALIASES = {
    "eos_token_id": "eos",
    "forced_bos_token_id": "forced_bos",
    "forced_eos_token_id": "forced_eos",
    "suppress_tokens": "suppress",
    "begin_suppress_tokens": "begin_suppress",
    "bad_words_ids": "bad_words",
}
"""transformers' names."""



@dataclass(frozen=True, slots=True)
class Generation:
    """One generation's settings. max_length counts the prompt (of a decoder: its start token).

    Raises ConfigError for values out of range.
    """

    eos: tuple[int, ...] = ()
    max_length: int = 0
    min_length: int = 0
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_repetition_penalty: float = 1.0
    encoder_no_repeat_ngram_size: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    forced_bos: int | None = None
    forced_eos: tuple[int, ...] = ()
    remove_invalid_values: bool = False
    suppress: tuple[int, ...] = ()
    begin_suppress: tuple[int, ...] = ()
    renormalize_logits: bool = False
    sampling: Sampling = _GREEDY

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_length", 1, 1 << 22),
            ("min_length", 0, 1 << 22),
            ("num_beams", 1, MAX_BEAMS),
            ("num_return_sequences", 1, self.num_beams),
            ("no_repeat_ngram_size", 0, 1 << 20),
            ("encoder_no_repeat_ngram_size", 0, 1 << 20),
        ):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ConfigError(f"{name}={value!r} is not an integer from {low} to {high}")
        for name in ("repetition_penalty", "encoder_repetition_penalty"):
            if not _is_number(getattr(self, name)) or not 0.0 < getattr(self, name) <= 1e6:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not a positive number")
        if not _is_number(self.length_penalty) or abs(self.length_penalty) > 100:
            raise ConfigError(f"length_penalty={self.length_penalty!r} is not a number from -100 to 100")
        if self.early_stopping not in (True, False, "never"):
            raise ConfigError(f"early_stopping={self.early_stopping!r} is not true, false or 'never'")
        if self.num_beams > 1 and self.sampling.temperature > 0:
            raise ConfigError("beam search with sampling is not offered: use num_beams=1, or do_sample=False")

    @property
    def processes(self) -> bool:
        """Whether anything changes the model's scores before a token is chosen, so that whole rows are needed."""
        plain = Generation(max_length=1)
        return any(
            getattr(self, field.name) != getattr(plain, field.name)
            for field in fields(self)
            if field.name not in _CHOICE
        )


_CHOICE = {"eos", "max_length", "num_beams", "num_return_sequences", "length_penalty", "early_stopping", "sampling"}
"""Settings that choose among scores, rather than change them."""


def settle(manifest: Manifest, prompt: int, **asked: Any) -> Generation:
    """A checkpoint's settings, changed by what the caller asked for (None: not asked). prompt: its length in tokens.

    Besides the fields of `Generation`: max_new_tokens, min_new_tokens, do_sample, temperature, top_k, top_p, min_p,
    seed, ignore_eos. Sampling happens only when asked for, by do_sample or a temperature; it then takes the
    checkpoint's temperature, top_k and top_p. Raises ConfigError for unknown names and values out of range.
    """
    given = {_ALIASES.get(name, name): value for name, value in asked.items() if value is not None}
    known = {field.name for field in fields(Generation)} | {*_LENGTHS, *_SAMPLING, "do_sample", "seed", "ignore_eos"}
    if set(given) - known:
        raise ConfigError(f"unknown settings {sorted(set(given) - known)}; there are {', '.join(sorted(known))}")
    check(_KINDS, given)
    _check_ids(manifest, given)
    own = dict(manifest.generation)
    names = {field.name for field in fields(Generation)}
    settings = {name: value for name, value in {**own, **given}.items() if name in names}
    settings["sampling"] = given.get("sampling") or _sampling(own, given)
    if settings["sampling"].temperature > 0:
        settings["num_beams"] = given.get("num_beams", 1)
    settings["max_length"] = _max_length(manifest, prompt, own, given)
    shortest = given.get("min_new_tokens", own.get("min_new_tokens"))
    if shortest is not None:
        settings["min_length"] = prompt + int(shortest)
    if given.get("ignore_eos"):
        settings |= {"eos": (), "min_length": 0}
    return _frozen(settings)


def _check_ids(manifest: Manifest, given: dict[str, Any]) -> None:
    words = [*given.get("bad_words", ()), *(given[name] for name in _IDS if name in given)]
    for word in words:
        check_ids(manifest, word if isinstance(word, list | tuple) else [word])


_IDS = ("eos", "forced_bos", "forced_eos", "suppress", "begin_suppress")
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("max_length", "max_new_tokens", "min_new_tokens", "top_k", "seed", "forced_bos"), int),
    **dict.fromkeys(("temperature", "top_p", "min_p"), float),
    **dict.fromkeys(("do_sample", "ignore_eos", "remove_invalid_values", "renormalize_logits"), bool),
    **dict.fromkeys(("eos", "forced_eos", "suppress", "begin_suppress"), int | list[int]),
    "bad_words": list[list[int]],
}
"""Those that `Generation` does not check."""

_LENGTHS = ("max_new_tokens", "min_new_tokens")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


def _max_length(manifest: Manifest, prompt: int, own: dict[str, Any], given: dict[str, Any]) -> int:
    """The caller's number of new tokens or length, else the checkpoint's, else 20 new ones; beyond the model
    only where the prompt leaves no room in it."""
    new = given.get("max_new_tokens")
    if new is None and "max_length" not in given:
        new = own.get("max_new_tokens")
    if new is not None:
        if type(new) is not int or not 0 < new <= MAX_NEW_TOKENS:
            raise ConfigError(f"max_new_tokens={new!r} is not an integer from 1 to {MAX_NEW_TOKENS}")
        return prompt + new
    if "max_length" in given:
        if given["max_length"] <= prompt:
            raise ConfigError(
                f"max_length={given['max_length']} leaves no room after a prompt of {prompt} tokens: use max_new_tokens"
            )
        return int(given["max_length"])
    if isinstance(own.get("max_length"), int) and own["max_length"] > prompt:
        return min(int(own["max_length"]), manifest.max_length)
    return max(min(prompt + DEFAULT_NEW_TOKENS, manifest.max_length), prompt + 1)


def _sampling(own: dict[str, Any], given: dict[str, Any]) -> Sampling:
    """Greedy unless sampling is asked for: do_sample, or a temperature that is not 0."""
    wanted = given.get("do_sample", given.get("temperature", 0) != 0 or bool({"top_p", "min_p"} & set(given)))
    if not wanted:
        return Sampling()
    chosen = {name: given.get(name, own.get(name, default)) for name, default in _DEFAULTS.items()}
    if chosen["temperature"] == 0:
        raise ConfigError("do_sample with temperature=0: use do_sample=False for the likeliest tokens")
    return Sampling(
        float(chosen["temperature"]),
        int(chosen["top_k"]),
        float(chosen["top_p"]),
        int(given.get("seed", 0)),
        float(chosen["min_p"]),
    )


_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
"""transformers' own."""


def _frozen(settings: dict[str, Any]) -> Generation:
    def ids(value: Any) -> tuple[int, ...]:
        return () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)

    for name in ("eos", "forced_eos", "suppress", "begin_suppress"):
        if name in settings:
            settings[name] = ids(settings[name])
    settings["bad_words"] = tuple(tuple(word) for word in settings.get("bad_words") or ())
    kept = {name: value for name, value in settings.items() if value is not None}
    for name in ("length_penalty", "repetition_penalty", "encoder_repetition_penalty"):
        if type(kept.get(name)) is int:
            kept[name] = float(kept[name])
    return Generation(**kept)


def with_forced_bos(settings: Generation, token: int | None) -> Generation:
    """The same, beginning with `token` (a target language's code), if there is one."""
    return settings if token is None else replace(settings, forced_bos=token)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
