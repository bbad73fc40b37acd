"""Small random checkpoints as Hugging Face folders: weights, config, tokenizer, licence."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from tallystick_model.loader import load_span
from tallystick_model.publish import publish
from tallystick_model.segments import Cache, Segment
from tallystick_model.span import Execution, SpanModel
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.manifest import Manifest, Piece
from tallystick_protocol.types import Span

TEXT = (
    "A tally stick was an ancient memory aid used to record and document numbers, quantities and messages. "
    "The split tally was a technique which became common in medieval Europe. A stick was marked with notches "
    "and then split lengthwise. This way the two halves both bear the same notches and each party keeps one half."
)

SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
"""Odd on purpose: heads of 12, a width that is no multiple of a vector."""

GPT2 = {"vocab_size": 320, "n_embd": 72, "n_layer": 4, "n_head": 6, "n_positions": 1024}
BERT = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"} | {"max_position_embeddings": 512}
ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}


def llama(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    return save(
        transformers.LlamaForCausalLM, transformers.LlamaConfig(**{**SMALL, **ENDS, **changes}), folder, seed, dtype
    )


def qwen2(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    return save(transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**{**SMALL, **ENDS, **changes}), folder, seed)


def mistral(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    config = transformers.MistralConfig(**{**SMALL, **ENDS, "sliding_window": 37, **changes})
    return save(transformers.MistralForCausalLM, config, folder, seed)


def gpt2(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    return save(transformers.GPT2LMHeadModel, transformers.GPT2Config(**{**GPT2, **ENDS, **changes}), folder, seed)


def bert(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    return save(transformers.BertModel, transformers.BertConfig(**{**BERT, **changes}), folder, seed)


def save(cls: Any, config: Any, folder: Path, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model with weights livelier than at initialisation, so that every part of it shows in the output."""
    torch.manual_seed(seed)
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval().to(dtype).save_pretrained(folder)
    add_companions(folder)
    return folder


def add_companions(folder: Path) -> None:
    """Tokenizer, generation config and licence."""
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (folder / "generation_config.json").write_text('{"bos_token_id": 0, "eos_token_id": 1}')
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\n---\n\nRandom weights, for tests.\n")


def tokenizer() -> Tokenizer:
    """All bytes, <s>, </s>, and what TEXT merges of them: 300 tokens at most."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def change_config(folder: Path, **changes: Any) -> None:
    """Rewrite config.json; a value of None removes the key."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if key not in changes or value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def reference(folder: Path, cls_name: str) -> Any:
    """The whole model in transformers, fp32, as a user would load it.

    Its weights are copied out of the mapped file: MKL's products give other bits for weights at odd addresses.
    """
    cls = getattr(transformers, cls_name)
    model = cls.from_pretrained(folder, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@dataclass(frozen=True)
class Published:
    """A manifest in a store, with the pieces as local files."""

    manifest: Manifest
    store: LocalStore
    folder: Path

    def open_piece(self, piece: Piece) -> Path:
        path = self.folder / str(piece.cid)
        if not path.exists():
            self.store.read_file(piece.cid, path, piece.bytes)
        return path

    def load(self, span: Span, execution: Execution = "canonical") -> SpanModel:
        return load_span(self.manifest, span, self.open_piece, execution=execution)

    def cut(self, *cuts: int, execution: Execution = "canonical") -> list[SpanModel]:
        """Spans that cover the model, cut at the given layers."""
        ends = [0, *cuts, self.manifest.layers]
        return [self.load(Span(start, end), execution) for start, end in pairwise(ends)]


def published(checkpoint: Path, root: Path, **options: Any) -> Published:
    """Publish a checkpoint folder into a store under `root`."""
    pieces = root / "pieces"
    pieces.mkdir(parents=True, exist_ok=True)
    store = LocalStore(root / "store")
    return Published(publish(checkpoint, store, **options), store, pieces)


class Session:
    """One session through a route of spans."""

    def __init__(self, spans: list[SpanModel], max_length: int = 1024) -> None:
        self.spans = spans
        self.caches: list[Cache | None] = [span.new_cache(max_length) for span in spans]
        self.length = 0

    def step(self, ids: torch.Tensor, wanted: list[int] | None = None) -> torch.Tensor:
        """Rows through every span in turn; what the last one returns."""
        rows = ids
        for span, cache in zip(self.spans, self.caches, strict=True):
            rows = span.forward([Segment(cache, self.length, rows, wanted=wanted)])[0]
        self.length += len(ids)
        return rows

    def steps(self, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """`ids` in chunks of the given lengths."""
        return torch.cat([self.step(chunk) for chunk in ids.split(lengths)])

    def crop(self, length: int) -> None:
        for cache in self.caches:
            if cache is not None:
                cache.crop(length)
        self.length = length
