"""A backend for the torch model that runs published spans in this process, canonical as nodes run them."""

from __future__ import annotations

import asyncio
import atexit
import copy
import shutil
import tempfile
import threading
from collections.abc import Coroutine
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from harness import checkpoints
from harness.checkpoints import Published, Session
from tallystick.passes import Adapters, Hidden, Trace
from tallystick.session.repair import RolledBack
from tallystick.torch.causal_lm import NetworkModelForCausalLM
from tallystick.verdict import Verdict
from tallystick_model.gradients import Adapter, SpanGradients


@cache
def served_llama() -> tuple[Any, NetworkModelForCausalLM, SpansBackend]:
    """The whole model, and the same one served in three spans; made once for all tests of a process."""
    folder = Path(tempfile.mkdtemp(prefix="tallystick-sdk-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    checkpoint = checkpoints.llama(folder / "model")
    backend = SpansBackend(checkpoints.published(checkpoint, folder / "pieces"), 1, 3)
    whole = checkpoints.reference(checkpoint, "LlamaForCausalLM").requires_grad_(False)
    return whole, NetworkModelForCausalLM(backend), backend


class SpansBackend:
    """The model in spans cut at the given layers."""

    def __init__(self, published: Published, *cuts: int) -> None:
        self.manifest = published.manifest
        self.spans = published.cut(*cuts)
        self.opened: list[SpansDecoder] = []
        self.rows_fed = 0
        self._published = published
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def decoder(self, max_length: int, beams: int) -> SpansDecoder:
        self.opened.append(SpansDecoder(self, max_length, beams))
        return self.opened[-1]

    async def passes(self) -> SpansPasses:
        return SpansPasses(self)

    async def piece(self, name: str) -> Path:
        return self._published.open_piece(next(piece for piece in self.manifest.pieces if piece.name == name))

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class SpansDecoder:
    """`tallystick.decoding.Decoder` over spans."""

    def __init__(self, backend: SpansBackend, max_length: int, beams: int) -> None:
        self.verdict = Verdict("off")
        self.finished = self.left = False
        self.caught_at: int | None = None
        self.wrong_from: int | None = None
        self._backend = backend
        self._sessions = [Session(backend.spans, max_length) for _ in range(beams)]
        self._rows: list[dict[int, np.ndarray]] = [{} for _ in range(beams)]

    async def __aenter__(self) -> SpansDecoder:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.left = True

    async def feed(self, ids: list[int], *, beam: int = 0, want: Literal["last", "all", "none"] = "last") -> None:
        session, count = self._sessions[beam], len(ids)
        wanted = {"last": [count - 1], "all": list(range(count)), "none": []}[want]
        self._backend.rows_fed += count
        logits = session.step(torch.tensor(ids), wanted).numpy()
        first = session.length - count
        for at, row in zip(wanted, logits, strict=True):
            wrong = self.wrong_from is not None and first + at >= self.wrong_from
            self._rows[beam][first + at] = -row if wrong else row

    async def row(self, position: int, *, beam: int = 0) -> np.ndarray:
        if self.caught_at is not None and position >= self.caught_at:
            raise RolledBack(position)
        return self._rows[beam][position]

    async def crop(self, length: int, *, beam: int = 0) -> None:
        self._sessions[beam].crop(length)

    async def reorder(self, parents: list[int]) -> None:
        self._sessions = [self._fork(parent) for parent in parents]
        self._rows = [dict(self._rows[parent]) for parent in parents]

    def _fork(self, parent: int) -> Session:
        old = self._sessions[parent]
        session = copy.copy(old)
        session.caches = copy.deepcopy(old.caches)
        return session

    async def finish(self) -> None:
        self.finished = True
        if self.caught_at is not None:
            raise RolledBack(self.caught_at)


class SpansPasses:
    """`tallystick.passes.Passes` over spans."""

    def __init__(self, backend: SpansBackend) -> None:
        self.verdict = Verdict("off")
        self._spans = [SpanGradients(span) for span in backend.spans]

    async def forward(
        self, rows: np.ndarray, adapters: Adapters | None = None, keep: int = 0, hidden: Hidden = "none"
    ) -> Trace:
        entered, states = [rows], []
        for span in self._spans:
            last = span.model.is_last
            passed = span.forward(torch.from_numpy(entered[-1]), own(span, adapters or {}), keep if last else 0, hidden)
            entered.append(passed.rows.numpy())
            states.append(passed.hidden.numpy())
        return Trace(entered.pop(), np.concatenate(states), tuple(entered), adapters or {}, keep)

    async def backward(self, trace: Trace, grad: np.ndarray) -> Any:
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for span, rows in reversed(list(zip(self._spans, trace.entered, strict=True))):
            mine = own(span, trace.adapters)
            if rows.dtype.kind == "i" and not mine:
                return None, found
            keep = trace.keep if span.model.is_last else 0
            grads = span.backward(torch.from_numpy(rows), mine, torch.from_numpy(grad), keep)
            found |= {name: (adapter.a.numpy(), adapter.b.numpy()) for name, adapter in grads.adapters.items()}
            grad = grad if grads.rows is None else grads.rows.numpy()
        return (grad if trace.entered[0].dtype.kind == "f" else None), found

    async def close(self) -> None:
        pass


def own(span: SpanGradients, adapters: Adapters) -> dict[str, Adapter]:
    return {
        name: Adapter(torch.from_numpy(a), torch.from_numpy(b))
        for name, (a, b) in adapters.items()
        if name in span.linears
    }
