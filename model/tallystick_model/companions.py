"""What travels with a model's weights: tokenizer, generation settings, pooling and licence of a checkpoint folder."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tallystick_model.checkpoint import Checkpoint
from tallystick_protocol.errors import ManifestError
from tallystick_protocol.manifest import Pooling

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
MAX_TOKENIZER_BYTES = 64 << 20
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def tokenizer_files(checkpoint: Checkpoint, vocab: int) -> dict[str, Path]:
    """The tokenizer's files. Raises ManifestError without tokenizer.json, or when it makes ids beyond `vocab`."""
    files = {name: checkpoint.folder / name for name in TOKENIZER_FILES if (checkpoint.folder / name).is_file()}
    if "tokenizer.json" not in files:
        raise ManifestError(
            f"{checkpoint.folder} has no tokenizer.json; write one with AutoTokenizer(...).save_pretrained(folder)"
        )
    for name, path in files.items():
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise ManifestError(f"{name} has {path.stat().st_size} bytes; {MAX_TOKENIZER_BYTES} is the limit")
    settings = checkpoint.read_json("tokenizer_config.json") or {}
    if "auto_map" in settings:
        raise ManifestError("tokenizer_config.json has auto_map: a tokenizer that brings its own code is not served")
    highest = max(read_tokenizer(files["tokenizer.json"]).get_vocab().values(), default=-1)
    if highest >= vocab:
        raise ManifestError(f"the tokenizer makes ids up to {highest}, the embedding has {vocab} rows")
    return files


def read_tokenizer(path: Path) -> Any:
    """A tokenizer.json. Raises ManifestError when the library cannot read it, or panics over it."""
    try:
        return Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - the library's Rust panics derive from BaseException
        raise ManifestError(f"tokenizer.json cannot be read: {str(error)[:120]}") from None


def generation_settings(checkpoint: Checkpoint, vocab: int, *, needs_eos: bool) -> dict[str, Any]:
    """{"eos": [ids], "bos": id, sampling defaults}. Raises ManifestError for ids out of range or a missing end."""
    given = {**(checkpoint.config or {}), **(checkpoint.read_json("generation_config.json") or {})}
    ends = given.get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    start = given.get("bos_token_id")
    for token in (*ends, *(() if start is None else (start,))):
        if type(token) is not int or not 0 <= token < vocab:
            raise ManifestError(f"special token id {str(token)[:20]} is not one of the {vocab} in the vocabulary")
    if needs_eos and not ends:
        raise ManifestError("no eos_token_id: name the id that ends an answer in generation_config.json")
    settings: dict[str, Any] = {"eos": sorted(set(ends))}
    if start is not None:
        settings["bos"] = start
    for name in _SAMPLING:
        value = given.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            settings[name] = value
    return settings


def pooling(checkpoint: Checkpoint) -> Pooling:
    """How rows become one sentence vector, as sentence-transformers wrote it; mean and normalised when it did not."""
    modules = checkpoint.read_json("modules.json")
    if modules is None:
        return Pooling("mean", True)
    kinds = {str(module.get("type", "")).rpartition(".")[2]: str(module.get("path", "")) for module in modules}
    if set(kinds) - {"Transformer", "Pooling", "Normalize"}:
        raise ManifestError(
            f"modules.json has {sorted(set(kinds) - {'Transformer', 'Pooling', 'Normalize'})}: not served"
        )
    folder = kinds.get("Pooling", "1_Pooling")
    if Path(folder).name != folder:
        raise ManifestError(f"modules.json names a folder {folder[:60]!r}")
    settings = checkpoint.read_json(f"{folder}/config.json") or {}
    modes = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value is True]
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(modes) != 1 or modes[0] not in known:
        raise ManifestError(f"pooling by {', '.join(modes) or 'nothing'} is not served; mean and cls are")
    return Pooling("mean" if known[modes[0]] == "mean" else "cls", "Normalize" in kinds)


def find_licence(checkpoint: Checkpoint) -> str:
    """The licence as the README's front matter or a LICENSE file says it. Raises ManifestError when nothing does."""
    readme = checkpoint.folder / "README.md"
    if readme.is_file():
        front = re.match(r"---\s*\n(.*?)\n---", readme.read_text("utf-8", errors="replace")[:20000], re.DOTALL)
        said = re.search(r"^license:\s*[\"']?([\w.+-]+)", front[1], re.MULTILINE) if front else None
        if said:
            return said[1]
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE"):
        path = checkpoint.folder / name
        if path.is_file():
            return _licence_of_text(path.read_text("utf-8", errors="replace")[:4000])
    said_in_config = (checkpoint.config or {}).get("license")
    if isinstance(said_in_config, str) and said_in_config:
        return said_in_config[:200]
    raise ManifestError("no licence found in README.md or LICENSE: say it with licence=...")


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
