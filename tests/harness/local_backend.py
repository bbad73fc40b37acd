"""The tasks' backend in one process: transformers computes the whole model, for tests of the tasks' own logic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.one_model import OneModel
from tallystick.client import Encoded
from tallystick.session.repair import RolledBack
from tallystick.verdict import Verdict
from tallystick_protocol.content.cid import Cid
from tallystick_protocol.manifest import Canary, Manifest, Pooling

_IDS = {
    "bos_token_id": "bos", "pad_token_id": "pad", "decoder_start_token_id": "decoder_start",
    "forced_bos_token_id": "forced_bos", "suppress_tokens": "suppress", "begin_suppress_tokens": "begin_suppress",
    "bad_words_ids": "bad_words",
}  # fmt: skip
_NAMES = (
    "num_beams", "max_length", "max_new_tokens", "min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "early_stopping", "length_penalty", "repetition_penalty", "renormalize_logits", "temperature", "top_k", "top_p",
)  # fmt: skip


def manifest_of(model: Any, folder: Path, task: str, output: str, pooling: Pooling | None = None) -> Manifest:
    """What publishing would say of a model, but for the pieces."""
    config = model.config
    labels: tuple[str, ...] = ()
    if output in ("scores", "label"):
        labels = tuple(config.id2label[i] for i in range(len(config.id2label)))
    if task == "question-answering":
        labels = ("start", "end")
    nowhere = Cid.of_raw(b"-")
    return Manifest(
        name=folder.name, licence="cc0-1.0", architecture=type(model).__name__,
        config=json.loads(config.to_json_string()), task=task, output=output, labels=labels,
        causal=config.is_encoder_decoder or "Causal" in type(model).__name__, numerics="fp32", quantization=None,
        encoder_layers=config.encoder_layers if config.is_encoder_decoder else 0,
        layers=config.num_hidden_layers + (config.decoder_layers if config.is_encoder_decoder else 0),
        width=config.hidden_size, vocab=config.vocab_size, max_length=config.max_position_embeddings, pieces=(),
        tied={}, tokenizer={}, generation=generation_of(model), pooling=pooling, norms=(),
        canary=Canary((), (), nowhere),
    )  # fmt: skip


def generation_of(model: Any) -> dict[str, Any]:
    """A model's generation config in the manifest's words."""
    config = model.generation_config if model.can_generate() else None
    if config is None:
        return {"eos": []}
    given = {key: value for key, value in config.to_dict().items() if value is not None}
    found = {_IDS[key]: value for key, value in given.items() if key in _IDS}
    found |= {key: value for key, value in given.items() if key in _NAMES}
    for key, name in (("eos_token_id", "eos"), ("forced_eos_token_id", "forced_eos")):
        value = given.get(key, [])
        found[name] = value if isinstance(value, list) else [value]
    return found


class LocalBackend(OneModel):
    """One model in this process. catch_at: rows that were asked for when a cheater is caught, each of them once."""

    def __init__(self, model: Any, folder: Path, manifest: Manifest, catch_at: tuple[int, ...] = ()) -> None:
        self.whole = model
        super().__init__(folder, manifest)
        self.asked = 0
        self.catch_at = set(catch_at)
        self.passes: list[int] = []

    async def run(
        self, model: str, ids: list[int], *, token_types: list[int] | None = None, want: list[int] | None = None,
        verify: str = "audit",
    ) -> Encoded:  # fmt: skip
        self.passes.append(len(ids))
        whole, given = self.whole, {"input_ids": torch.tensor([ids])}
        if token_types is not None:
            given["token_type_ids"] = torch.tensor([token_types])
        with torch.inference_mode():
            if self.manifest.encoder_layers:
                rows = whole.get_encoder()(**given).last_hidden_state[0]
            else:
                out = whole(**given)
                rows = {
                    "logits": lambda: out.logits[0],
                    "hidden": lambda: out.last_hidden_state[0],
                    "label": lambda: out.logits,
                    "scores": lambda: (
                        out.logits[0] if "logits" in out else torch.stack([out.start_logits, out.end_logits], -1)[0]
                    ),
                }[self.manifest.output]()
        if want is not None and self.manifest.output != "label":
            rows = rows[want]
        return Encoded(rows.numpy(), [], Verdict("off"))

    def decoder(
        self, model: str, *, max_length: int, beams: int = 1, dense: bool = False, memory: np.ndarray | None = None,
        verify: str = "audit",
    ) -> LocalDecoder:  # fmt: skip
        return LocalDecoder(self, max_length, beams, dense, memory)


class LocalDecoder:
    """Beams as lists of ids; every row is computed anew from the whole sequence, so nothing can go stale."""

    def __init__(
        self, backend: LocalBackend, max_length: int, beams: int, dense: bool, memory: np.ndarray | None
    ) -> None:
        self.manifest = backend.manifest
        self.verdict = Verdict("off")
        self.route: list[Any] = []
        self._backend = backend
        self._max_length = max_length
        self._beams: list[list[int]] = [[] for _ in range(beams)]
        self._wanted: list[set[int]] = [set() for _ in range(beams)]
        self._dense = dense
        self._memory = memory
        self.finished = False

    async def __aenter__(self) -> LocalDecoder:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def feed(self, ids: list[int], *, beam: int = 0, want: str = "last") -> None:
        start, end = len(self._beams[beam]), len(self._beams[beam]) + len(ids)
        self._beams[beam] += ids
        assert end <= self._max_length
        self._wanted[beam] |= set(range(start, end)) if want == "all" else {end - 1} if want == "last" else set()

    async def row(self, position: int, *, beam: int = 0) -> Any:
        backend = self._backend
        backend.asked += 1
        if backend.asked in backend.catch_at:
            backend.catch_at.remove(backend.asked)
            raise RolledBack(0)
        assert position in self._wanted[beam]
        ids = torch.tensor([self._beams[beam][: position + 1]])
        with torch.inference_mode():
            if self._memory is None:
                logits = backend.whole(ids).logits[0, -1]
            else:
                states = (torch.from_numpy(self._memory.copy())[None],)
                logits = backend.whole(encoder_outputs=states, decoder_input_ids=ids).logits[0, -1]
        if self._dense:
            return logits.numpy()
        top = logits.topk(min(64, len(logits)))
        return top.indices.numpy(), top.values.numpy()

    async def crop(self, length: int, *, beam: int = 0) -> None:
        del self._beams[beam][length:]

    async def reorder(self, parents: list[int]) -> None:
        assert len(parents) == len(self._beams)
        self._beams = [list(self._beams[parent]) for parent in parents]
        self._wanted = [set(self._wanted[parent]) for parent in parents]

    async def finish(self) -> None:
        self.finished = True
