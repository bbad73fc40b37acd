"""What travels with a model's weights: the tokenizer's files, the chat template, how sentences are pooled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tallystick_model.publishing.checkpoint import TensorSource
from tallystick_model.sandbox.conversion import convert_tokenizer
from tallystick_model.sandbox.templates import MAX_TEMPLATE, check_template
from tallystick_model.sandbox.tokenizers import MAX_TOKENIZER_BYTES, Examined, examine_tokenizer
from tallystick_protocol.errors import ManifestError
from tallystick_protocol.manifest import Pooling

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
SLOW_FILES = (
    "spiece.model", "spm.model", "source.spm", "sentencepiece.bpe.model", "sentencepiece.model", "tokenizer.model",
    "vocab.txt", "vocab.json", "merges.txt",
)  # fmt: skip
"""What a tokenizer without tokenizer.json consists of."""


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
    settings, _ = (json_object(source, name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
    if "auto_map" in settings:
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
        check_template(template.decode())
        contents["chat_template.jinja"] = template
    return Companions(contents, found.ids)


def json_object(source: TensorSource, name: str) -> dict[str, Any]:
    """A JSON file that holds an object; empty when it is not there. Raises ManifestError for anything else."""
    value = source.read_json(name)
    if value is not None and not isinstance(value, dict):
        raise ManifestError(f"{name} holds a {type(value).__name__} where an object belongs")
    return value or {}


def chat_template(source: TensorSource, settings: dict[str, Any]) -> bytes | None:
    """The chat template in UTF-8: its own file, or a field of tokenizer_config.json (of several, the default)."""
    path = source.folder / "chat_template.jinja"
    if path.is_file():
        given: Any = read_text(path)
    else:
        given = settings.get("chat_template") or json_object(source, "chat_template.json").get("chat_template")
    if isinstance(given, list):
        named = {str(one.get("name")): one.get("template") for one in given if isinstance(one, dict)}
        given = named.get("default", next(iter(named.values()), None))
    if given is not None and not isinstance(given, str):
        raise ManifestError("tokenizer_config.json: chat_template is neither text nor a list of templates")
    try:
        return given.encode() if given else None
    except UnicodeEncodeError:
        raise ManifestError("the chat template holds half a character: it is not text") from None


def read_text(path: Path) -> str:
    """A file of at most MAX_TEMPLATE bytes in UTF-8. Raises ManifestError for another."""
    size = path.stat().st_size
    if size > MAX_TEMPLATE:
        raise ManifestError(f"{path.name} has {size} bytes; {MAX_TEMPLATE} is the limit")
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        raise ManifestError(f"{path.name} is not text") from None


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
    if Path(folder).name != folder or folder in ("", ".."):
        raise ManifestError(f"modules.json names a folder {folder[:60]!r}")
    settings = json_object(source, f"{folder}/config.json")
    modes = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value is True]
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(modes) != 1 or modes[0] not in known:
        raise ManifestError(f"pooling by {', '.join(modes) or 'nothing'} is not served; mean and cls are")
    return Pooling("mean" if known[modes[0]] == "mean" else "cls", "Normalize" in kinds)
