"""Forward and backward passes over a route of nodes, for whoever tunes a prompt or adapters on a served model.

The client holds everything that is tuned and everything that passes from span to span; a node keeps nothing between
requests, so one that fails is replaced in mid-pass. NumPy arrays in and out: `tallystick.torch` makes them tensors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import numpy as np

from tallystick.lanes import Lane, Workshop
from tallystick.routing.candidates import Candidate
from tallystick.verdict import Verdict
from tallystick_protocol.errors import ConfigError
from tallystick_protocol.frames import Kind
from tallystick_protocol.passes import A_SUFFIX, B_SUFFIX, BACKWARD_ROWS, MAX_ROWS

Hidden = Literal["none", "last", "all"]
Adapters = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""{linear module: (a (r, in), b (out, r))}, fp32: y = W x + b a x."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A forward pass. rows: logits (keep or n, vocab). hidden: (k, n, width), see `forward`. The rest: `backward`'s."""

    rows: np.ndarray
    hidden: np.ndarray
    entered: tuple[np.ndarray, ...]
    adapters: Adapters
    keep: int


class Passes:
    """Passes over one model's layers. Use as an async context manager; several passes may run at a time."""

    def __init__(self, workshop: Workshop, route: list[Candidate]) -> None:
        self._lanes = [Lane(workshop, route, index) for index in range(len(route))]
        self._workshop = workshop
        self._ready = asyncio.Lock()
        self._is_ready = False

    async def __aenter__(self) -> Passes:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        for lane in self._lanes:
            await lane.close()
        self._workshop.release()

    @property
    def verdict(self) -> Verdict:
        return self._workshop.verdict

    async def forward(
        self, rows: np.ndarray, adapters: Adapters | None = None, keep: int = 0, hidden: Hidden = "none"
    ) -> Trace:
        """One sequence through the model.

        rows: (n,) ids or (n, width) fp32 embeddings. keep: logits of so many last rows, 0 for all. hidden: "none",
        "last" (what enters the head, k = 1), "all" (every layer's input, then that). Raises NoRoute, BadTensor,
        ContextLengthExceeded, CorruptResult, NoAuditor, PaymentError, ConfigError.
        """
        adapters = dict(adapters or {})
        self._check(rows, adapters)
        async with self._ready:
            if not self._is_ready:
                await self._workshop.reserve([candidate for lane in self._lanes for candidate in lane.draw()])
                self._is_ready = True
        manifest = self._workshop.manifest
        entered, states = [rows[:, None] if rows.ndim == 1 else rows], []
        for lane in self._lanes:
            last = lane.span.end == manifest.layers
            tensors = {"rows": entered[-1], **_tensors(lane, adapters)}
            count = len(rows)
            leaving = (keep or count, manifest.vocab) if last else (count, manifest.width)
            expected: dict[str, tuple[int, ...]] = {"rows": leaving}
            layers = (len(lane.span) if hidden == "all" else 0) + (hidden != "none" and last)
            if layers:
                expected["hidden"] = (layers * count, manifest.width)
            body = {"keep": keep if last else 0, "hidden": hidden}
            answer = await lane.ask(Kind.FORWARD, body, tensors, expected, count)
            entered.append(answer["rows"])
            if layers:
                states.append(answer["hidden"].reshape(layers, count, manifest.width))
        found = np.concatenate(states) if states else np.empty((0, len(rows), manifest.width), np.float32)
        return Trace(entered.pop(), found, tuple(entered), adapters, keep)

    async def backward(
        self, trace: Trace, grad: np.ndarray
    ) -> tuple[np.ndarray | None, dict[str, tuple[np.ndarray, np.ndarray]]]:
        """Gradients of sum(grad * trace.rows): of the embeddings (None where ids entered), and of every adapter."""
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        manifest = self._workshop.manifest
        count = len(trace.entered[0])
        for lane, entered in reversed(list(zip(self._lanes, trace.entered, strict=True))):
            own = _tensors(lane, trace.adapters)
            differentiable = entered.dtype.kind == "f"
            if not differentiable and not own:
                return None, found
            expected = {name: tensor.shape for name, tensor in own.items()}
            if differentiable:
                expected["rows"] = entered.shape
            keep = trace.keep if lane.span.end == manifest.layers else 0
            tensors = {"rows": entered, "grad": grad, **own}
            answer = await lane.ask(Kind.BACKWARD, {"keep": keep}, tensors, expected, BACKWARD_ROWS * count)
            found |= {
                name: (answer[name + A_SUFFIX], answer[name + B_SUFFIX])
                for name in trace.adapters
                if name + A_SUFFIX in answer
            }
            grad = answer.get("rows", grad)
        return (grad if trace.entered[0].dtype.kind == "f" else None), found

    def _check(self, rows: np.ndarray, adapters: Adapters) -> None:
        manifest = self._workshop.manifest
        limit = min(manifest.max_length, MAX_ROWS)
        if not 0 < len(rows) <= limit:
            raise ConfigError(f"a pass takes 1 to {limit} rows, not {len(rows)}")
        if (rows.ndim, rows.dtype.kind) not in ((1, "i"), (2, "f")) or rows.shape[1:] not in ((), (manifest.width,)):
            raise ConfigError(f"a pass takes ids (n,) or embeddings (n, {manifest.width})")
        for name in adapters:
            if not 0 <= layer_of(name) < manifest.layers:
                raise ConfigError(f"{name} does not lie in a layer of the model")


def layer_of(module: str) -> int:
    """The layer that a module's dotted name lies in: its first number; -1 without one."""
    return next((int(part) for part in module.split(".") if part.isdecimal()), -1)


def _tensors(lane: Lane, adapters: Adapters) -> dict[str, np.ndarray]:
    """The adapters of a lane's layers, as they travel."""
    return {
        name + suffix: half
        for name, halves in adapters.items()
        if lane.span.start <= layer_of(name) < lane.span.end
        for suffix, half in zip((A_SUFFIX, B_SUFFIX), halves, strict=True)
    }
