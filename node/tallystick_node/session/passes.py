"""Forward and backward passes for a client that tunes: tensors in, tensors out, nothing kept between requests.

A pass runs the span over one whole sequence, with the client's own adapters. It is charged like rows of a session, in
advance of its computation; nothing about it is signed (docs/sdk.md says what a client can check).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import numpy as np
import torch

from tallystick_model.gradients import Adapter, Hidden, SpanGradients
from tallystick_node.scheduling.engine import Engine
from tallystick_node.session.billing import Billing
from tallystick_protocol.errors import BadFrame, BadTensor, ContextLengthExceeded, Rejected
from tallystick_protocol.frames import DType, Frame, take
from tallystick_protocol.passes import (
    A_SUFFIX,
    B_SUFFIX,
    BACKWARD_ROWS,
    MAX_RANK,
    MAX_ROWS,
    Collector,
    tensor_frames,
)
from tallystick_protocol.types import Address, Span, Wei
from tallystick_protocol.vouchers import charge

_HIDDEN: tuple[Hidden, ...] = ("none", "last", "all")


class Passes:
    """The passes of one session."""

    def __init__(
        self,
        engine: Engine,
        asked: Span,
        client: Address,
        price: Wei,
        max_length: int,
        billing: Billing,
        send: Callable[[Frame], Awaitable[None]],
        reserve: Callable[[int], None],
    ) -> None:
        """asked: the session's layers. max_length: the session's; rows of a pass at most. send: to the client.

        reserve: bytes, or Overloaded.
        """
        self._engine = engine
        self._asked = asked
        self._client = client
        self._price = price
        self._max_rows = min(max_length, MAX_ROWS)
        self._billing = billing
        self._send = send
        self._held = Collector(self._expect, reserve)
        self._span: SpanGradients | None = None

    @property
    def span(self) -> SpanGradients:
        """Made when the first tensor comes. Raises Rejected for parts and for models whose gradients are not served."""
        if self._asked != self._engine.model.span:
            raise Rejected("passes run over a node's whole span: open the session for all its layers")
        if self._span is None:
            self._span = SpanGradients(self._engine.model)
        return self._span

    async def take(self, frame: Frame) -> None:
        """A TENSOR frame. Raises BadFrame, BadTensor, BadPosition, Overloaded, Rejected."""
        self._held.take(frame)

    async def forward(self, frame: Frame) -> None:
        """FORWARD: run the span over the rows that came. Raises as `SpanGradients.forward`, and PaymentError."""
        request, keep, tensors = self._request(frame)
        hidden = next((form for form in _HIDDEN if form == frame.body.get("hidden", "none")), None)
        if hidden is None:
            raise BadFrame("hidden is none, last or all")
        rows, adapters = _rows(tensors), _adapters(tensors)
        await self._charge(len(rows))
        span = self.span
        passed = await self._engine.run(lambda: span.forward(rows, adapters, keep, hidden), self._client, len(rows))
        answer = {"rows": passed.rows}
        if len(passed.hidden):
            answer["hidden"] = passed.hidden.flatten(0, 1)
        await self._answer(request, answer)

    async def backward(self, frame: Frame) -> None:
        """BACKWARD: gradients of the rows and adapters that came. Raises as `SpanGradients.backward`, PaymentError."""
        request, keep, tensors = self._request(frame)
        if "grad" not in tensors:
            raise BadTensor("a backward pass takes the gradient of what left the span: tensor 'grad'")
        rows, adapters, grad = _rows(tensors), _adapters(tensors), _floats(tensors["grad"])
        await self._charge(BACKWARD_ROWS * len(rows))
        span = self.span
        rows_charged = BACKWARD_ROWS * len(rows)
        found = await self._engine.run(
            lambda: span.backward(rows, adapters, grad, keep), self._client, rows_charged
        )
        answer = {} if found.rows is None else {"rows": found.rows}
        for name, adapter in found.adapters.items():
            answer |= {name + A_SUFFIX: adapter.a, name + B_SUFFIX: adapter.b}
        await self._answer(request, answer)

    def _request(self, frame: Frame) -> tuple[int, int, dict[str, np.ndarray]]:
        request, keep = take(frame.body, "request", int), take(frame.body, "keep", int, 0)
        tensors = self._held.whole(request)
        if "rows" not in tensors:
            raise BadTensor("a pass takes the rows that enter the span: tensor 'rows'")
        return request, keep, tensors

    async def _charge(self, num_rows: int) -> None:
        model = self._engine.model
        cost = charge(model.span, model.manifest.layers, self._price, num_rows)
        await self._billing.book(cost, lambda: False, waits=False)

    async def _answer(self, request: int, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            for frame in tensor_frames(request, name, tensor.numpy()):
                await self._send(frame)

    def _expect(self, name: str, dtype: DType, rows: int, width: int) -> None:
        """Raises BadTensor, ContextLengthExceeded for a tensor that no pass through this span takes."""
        model, manifest = self._engine.model, self._engine.model.manifest
        linears = self.span.linears
        if name in ("rows", "grad"):
            if not 0 < rows <= self._max_rows:
                raise ContextLengthExceeded(f"a pass here takes 1 to {self._max_rows} rows", limit=self._max_rows)
            ids = name == "rows" and model.is_first and dtype is DType.IDS
            values = 1 if ids else manifest.vocab if name == "grad" and model.is_last else manifest.width
            if width != values or (dtype is DType.IDS and not ids):
                raise BadTensor(f"{name} of this span has {values} values a row", width=values)
            return
        suffix = next((end for end in (A_SUFFIX, B_SUFFIX) if name.endswith(end)), "")
        module = name.removesuffix(suffix)
        shape = linears.get(module) if suffix else None
        if shape is None:
            raise BadTensor(f"there is no linear module {module[:80]!r} in these layers to adapt")
        rank, other, side = (rows, width, shape[0]) if suffix == A_SUFFIX else (width, rows, shape[1])
        if not 0 < rank <= MAX_RANK or other != side or dtype is not DType.F32:
            raise BadTensor(f"{name} has rank 1 to {MAX_RANK} and {side} on its other side", max_rank=MAX_RANK)


def _rows(tensors: dict[str, np.ndarray]) -> torch.Tensor:
    """Ids (n,) int64, or fp32 rows (n, width)."""
    rows = tensors["rows"]
    return torch.from_numpy(rows[:, 0].astype(np.int64)) if rows.dtype.kind == "u" else _floats(rows)


def _adapters(tensors: dict[str, np.ndarray]) -> dict[str, Adapter]:
    """Raises BadTensor for one half of an adapter."""
    found = {}
    names = {name.removesuffix(A_SUFFIX).removesuffix(B_SUFFIX) for name in tensors if name not in ("rows", "grad")}
    for name in sorted(names):
        if name + A_SUFFIX not in tensors or name + B_SUFFIX not in tensors:
            raise BadTensor(f"the adapter of {name} is {name}{A_SUFFIX} and {name}{B_SUFFIX}; one is missing")
        found[name] = Adapter(_floats(tensors[name + A_SUFFIX]), _floats(tensors[name + B_SUFFIX]))
    return found


def _floats(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
