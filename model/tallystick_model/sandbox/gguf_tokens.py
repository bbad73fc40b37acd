"""Fits the tokenizer that transformers made of a GGUF file to the tokens that the file has: runs in the worker.

transformers' tokenizer classes bring tokens of their own (`<|endoftext|>`, `<mask>`, T5's blanks) and put those that a
file does not have behind its last. No row of the embedding stands for them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def fit(folder: Path, tokens: list[str]) -> None:
    """Rewrite tokenizer.json and tokenizer_config.json of a folder without tokens behind the file's last one.

    A token that the file has in its own spelling, where transformers wrote it in bytes, gets its place. Raises
    ValueError when the tokenizer would put a token that is gone into every text.
    """
    path = folder / "tokenizer.json"
    made: dict[str, Any] = json.loads(path.read_text("utf-8"))
    beyond = [added["content"] for added in made["added_tokens"] if added["id"] >= len(tokens)]
    if not beyond:
        return
    places = {token: place for place, token in enumerate(tokens)}
    moved = {token: places[token] for token in beyond if token in places}
    gone = frozenset(beyond) - moved.keys()
    _give_places(made, moved)
    made["added_tokens"] = sorted(
        ({**added, "id": moved.get(added["content"], added["id"])}
         for added in made["added_tokens"] if added["content"] not in gone),
        key=lambda added: added["id"],
    )  # fmt: skip
    for name, entry in ((made.get("post_processor") or {}).get("special_tokens") or {}).items():
        if name in gone:
            raise ValueError(f"it puts {name} into every text, which is none of the file's {len(tokens)} tokens")
        entry["ids"] = [moved[name]] if name in moved else entry["ids"]
    path.write_text(json.dumps(made, ensure_ascii=False), "utf-8")
    _forget(folder / "tokenizer_config.json", gone)


def _give_places(made: dict[str, Any], moved: dict[str, int]) -> None:
    """In the vocabulary of the model, tokens in their own spelling instead of the one in bytes."""
    vocab = made["model"].get("vocab")
    if not moved or not isinstance(vocab, dict):
        return
    spelt = {place: word for word, place in vocab.items()}
    for token, place in moved.items():
        vocab.pop(spelt.get(place, ""), None)
        vocab[token] = place


def _forget(path: Path, gone: frozenset[str]) -> None:
    """Take names of special tokens out of the settings."""
    settings: dict[str, Any] = json.loads(path.read_text("utf-8"))
    kept = {key: value for key, value in settings.items() if not (isinstance(value, str) and value in gone)}
    for key, value in kept.items():
        if isinstance(value, list):
            kept[key] = [one for one in value if not (isinstance(one, str) and one in gone)]
    path.write_text(json.dumps(kept, ensure_ascii=False), "utf-8")
