"""What a checkpoint says of generation: where answers end, which ids are forced or suppressed, how to sample."""

from __future__ import annotations

from typing import Any

from tallystick_model.publishing.checkpoint import TensorSource
from tallystick_model.publishing.companions import json_object
from tallystick_protocol.errors import ManifestError

MAX_SUPPRESSED = 1024
_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "length_penalty",
    "encoder_repetition_penalty",
)  # fmt: skip
_COUNTS = {
    "num_beams": 64, "max_length": 1 << 22, "max_new_tokens": 1 << 22, "min_length": 1 << 22,
    "min_new_tokens": 1 << 22, "no_repeat_ngram_size": 1 << 10, "encoder_no_repeat_ngram_size": 1 << 10,
}  # fmt: skip
_FLAGS = ("do_sample", "early_stopping", "renormalize_logits", "remove_invalid_values")
_IDS = {
    "bos_token_id": "bos",
    "pad_token_id": "pad",
    "decoder_start_token_id": "decoder_start",
    "forced_bos_token_id": "forced_bos",
}


def generation_settings(source: TensorSource, vocab: int, *, needs_eos: bool) -> dict[str, Any]:
    """What generation needs, of generation_config.json and, older, of config.json.

    {"eos": [ids], "bos" "pad" "decoder_start" "forced_bos": id, "forced_eos": [ids], "suppress" "begin_suppress":
    [ids], "bad_words": [[ids]], sampling and beam-search defaults by transformers' names}; what is not set is absent.
    Raises ManifestError for ids out of range, numbers that are not finite, or a missing end.
    """
    given = {**source.config, **json_object(source, "generation_config.json")}
    if given.get("pad_token_id") == -1:  # an old way to say that there is none
        del given["pad_token_id"]
    settings: dict[str, Any] = {"eos": sorted(set(_ids(given, "eos_token_id", vocab)))}
    if needs_eos and not settings["eos"]:
        raise ManifestError("no eos_token_id: name the id that ends an answer in generation_config.json")
    for key, name in _IDS.items():
        if ids := _ids(given, key, vocab):
            settings[name] = ids[0]
    for key, name in (
        ("forced_eos_token_id", "forced_eos"), ("suppress_tokens", "suppress"),
        ("begin_suppress_tokens", "begin_suppress"),
    ):  # fmt: skip
        if ids := _ids(given, key, vocab):
            settings[name] = ids
    words = given.get("bad_words_ids")
    if isinstance(words, list) and words:
        if len(words) > MAX_SUPPRESSED:
            raise ManifestError(f"bad_words_ids has {len(words)} entries, {MAX_SUPPRESSED} is the limit")
        settings["bad_words"] = [_ids({"bad_words_ids": word}, "bad_words_ids", vocab) for word in words]
    return settings | _numbers(given)


def _numbers(given: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in _SAMPLING:
        value = given.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not abs(value) <= 1e6:
                raise ManifestError(f"generation setting {name} is {str(value)[:40]}, not a finite number up to 1e6")
            found[name] = value
    for name, high in _COUNTS.items():
        value = given.get(name)
        if value is not None:
            if type(value) is not int or not 0 <= value <= high:
                raise ManifestError(f"generation setting {name} is {str(value)[:40]!r}, not 0 to {high}")
            found[name] = value
    if given.get("early_stopping") == "never":
        found["early_stopping"] = "never"
    return found | {name: given[name] for name in _FLAGS if isinstance(given.get(name), bool)}


def _ids(given: dict[str, Any], key: str, vocab: int) -> list[int]:
    value = given.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if len(ids) > MAX_SUPPRESSED:
        raise ManifestError(f"{key} has {len(ids)} entries, {MAX_SUPPRESSED} is the limit")
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab:
            raise ManifestError(f"{key}: token id {str(token)[:20]} is not one of the {vocab} in the vocabulary")
    return ids
