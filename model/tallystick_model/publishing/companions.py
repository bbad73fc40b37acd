"""What travels with a model's weights: tokenizer, chat template, generation settings, pooling and licence."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tallystick_model.publishing.checkpoint import TensorSource
from tallystick_model.sandbox.conversion import convert_tokenizer
from tallystick_model.sandbox.templates import check_template
from tallystick_model.sandbox.tokenizers import MAX_TOKENIZER_BYTES, Examined, examine_tokenizer
from tallystick_protocol.errors import ManifestError
from tallystick_protocol.manifest import Pooling

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
SLOW_FILES = (
    "spiece.model", "source.spm", "sentencepiece.bpe.model", "tokenizer.model", "vocab.txt", "vocab.json", "merges.txt",
)  # fmt: skip
"""What a tokenizer without tokenizer.json consists of."""

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


@dataclass(frozen=True, slots=True)
class Companions:
    """files: content by name, as nodes and clients get it. canary: ids of the canary's text."""

    files: dict[str, bytes]
    canary: tuple[int, ...]


def companions(source: TensorSource, vocab: int, scratch: Path, text: str) -> Companions:
    """The tokenizer's files, the chat template and the generation config, each read in a limited process.

    A folder without tokenizer.json has it made from its slow tokenizer's files, by transformers' own converters.
    scratch: a folder for that. text: what the canary's ids stand for. Raises ManifestError when there is no tokenizer,
    it makes ids beyond `vocab`, brings code, or it or the template goes over its limits.
    """
    files = {name: path for name in TOKENIZER_FILES if (path := source.folder / name).is_file()}
    settings = source.read_json("tokenizer_config.json") or {}
    if not isinstance(settings, dict) or "auto_map" in settings:
        raise ManifestError("tokenizer_config.json has auto_map: a tokenizer that brings its own code is not served")
    if "tokenizer.json" not in files:
        files["tokenizer.json"] = _made(source, scratch)
    for name, path in files.items():
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise ManifestError(f"{name} has {path.stat().st_size} bytes; {MAX_TOKENIZER_BYTES} is the limit")
    found: Examined = examine_tokenizer(files["tokenizer.json"], text)
    if found.highest >= vocab:
        raise ManifestError(f"the tokenizer makes ids up to {found.highest}, the embedding has {vocab} rows")
    contents = {name: path.read_bytes() for name, path in files.items() if path.stat().st_size}
    template = chat_template(source, settings)
    if template is not None:
        check_template(template)
        contents["chat_template.jinja"] = template.encode()
    return Companions(contents, found.ids)


def chat_template(source: TensorSource, settings: dict[str, Any]) -> str | None:
    """The chat template: its own file, or a field of tokenizer_config.json (of several, the default). Else None."""
    path = source.folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_bytes()[: MAX_TOKENIZER_BYTES].decode()
        except UnicodeDecodeError:
            raise ManifestError("chat_template.jinja is not text") from None
    given = settings.get("chat_template")
    if given is None:
        own = source.read_json("chat_template.json")
        given = own.get("chat_template") if isinstance(own, dict) else None
    if isinstance(given, list):
        named = {one.get("name"): one.get("template") for one in given if isinstance(one, dict)}
        given = named.get("default", next(iter(named.values()), None))
    if given is not None and not isinstance(given, str):
        raise ManifestError("tokenizer_config.json: chat_template is neither text nor a list of templates")
    return given or None


def _made(source: TensorSource, scratch: Path) -> Path:
    """A tokenizer.json made from other files. Raises ManifestError when there are none, or no conversion for them."""
    advice = "write one with AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
    if not any((source.folder / name).is_file() for name in SLOW_FILES):
        raise ManifestError(f"{source.folder} has no tokenizer.json; {advice}")
    made = scratch / "tokenizer"
    made.mkdir(parents=True, exist_ok=True)
    try:
        convert_tokenizer(source.folder, made)
    except ManifestError as error:
        why = error.message
        raise ManifestError(f"{source.folder} has no tokenizer.json and none can be made ({why}); {advice}") from None
    if not (made / "tokenizer.json").is_file():
        raise ManifestError(f"{source.folder} has no tokenizer.json and transformers makes none; {advice}")
    return made / "tokenizer.json"


def generation_settings(source: TensorSource, vocab: int, *, needs_eos: bool) -> dict[str, Any]:
    """What generation needs, of generation_config.json and, older, of config.json.

    {"eos": [ids], "bos" "pad" "decoder_start" "forced_bos": id, "forced_eos": [ids], "suppress" "begin_suppress":
    [ids], "bad_words": [[ids]], sampling and beam-search defaults by transformers' names}; what is not set is absent.
    Raises ManifestError for ids out of range, numbers that are not finite, or a missing end.
    """
    own = source.read_json("generation_config.json")
    given = {**source.config, **(own if isinstance(own, dict) else {})}
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
            if not math.isfinite(value) or abs(value) > 1e6:
                raise ManifestError(f"generation setting {name} is {value}, not a finite number up to 1e6")
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


def pooling(source: TensorSource) -> Pooling:
    """How rows become one sentence vector, as sentence-transformers wrote it; mean and normalised when it did not."""
    modules = source.read_json("modules.json")
    if modules is None:
        return Pooling("mean", True)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ManifestError("modules.json is not a list of modules")
    kinds = {str(module.get("type", "")).rpartition(".")[2]: str(module.get("path", "")) for module in modules}
    if set(kinds) - {"Transformer", "Pooling", "Normalize"}:
        raise ManifestError(
            f"modules.json has {sorted(set(kinds) - {'Transformer', 'Pooling', 'Normalize'})}: not served"
        )
    folder = kinds.get("Pooling", "1_Pooling")
    if Path(folder).name != folder:
        raise ManifestError(f"modules.json names a folder {folder[:60]!r}")
    settings = source.read_json(f"{folder}/config.json") or {}
    modes = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value is True]
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(modes) != 1 or modes[0] not in known:
        raise ManifestError(f"pooling by {', '.join(modes) or 'nothing'} is not served; mean and cls are")
    return Pooling("mean" if known[modes[0]] == "mean" else "cls", "Normalize" in kinds)


def find_licence(source: TensorSource) -> str:
    """The licence as the README's front matter or a LICENSE file says it. Raises ManifestError when nothing does."""
    readme = source.folder / "README.md"
    if readme.is_file():
        front = re.match(r"---\s*\n(.*?)\n---", readme.read_text("utf-8", errors="replace")[:20000], re.DOTALL)
        said = re.search(r"^license:\s*[\"']?([\w.+-]+)", front[1], re.MULTILINE) if front else None
        if said:
            return said[1]
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE"):
        path = source.folder / name
        if path.is_file():
            return _licence_of_text(path.read_text("utf-8", errors="replace")[:4000])
    said_in_config = source.config.get("license")
    if isinstance(said_in_config, str) and said_in_config:
        return said_in_config[:200]
    raise ManifestError("no licence found in README.md or LICENSE: say it with --licence")


def _licence_of_text(text: str) -> str:
    for mark, identifier in (
        ("Apache License", "Apache-2.0"),
        ("MIT License", "MIT"),
        ("BSD 3-Clause", "BSD-3-Clause"),
    ):
        if mark in text:
            return identifier
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return lines[0][:200] if lines else "unknown"
