"""What the torch model needs of whoever runs its layers, and the network as that."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from tallystick.blocking import Client
from tallystick.decoding import Row, Want
from tallystick.passes import Adapters, Hidden, Trace
from tallystick.verdict import Policy, Verdict
from tallystick_protocol.chain.reads import ModelRecord
from tallystick_protocol.manifest import Manifest

T = TypeVar("T")


class Decoding(Protocol):
    """Several sessions side by side; `tallystick.decoding.Decoder` says what each method does."""

    verdict: Verdict

    async def feed(self, ids: list[int], *, beam: int = 0, want: Want = "last") -> None: ...
    async def row(self, position: int, *, beam: int = 0) -> Row: ...
    async def crop(self, length: int, *, beam: int = 0) -> None: ...
    async def reorder(self, parents: list[int]) -> None: ...
    async def finish(self) -> None: ...


class Passing(Protocol):
    """Whole-sequence passes; `tallystick.passes.Passes` says what each method does."""

    @property
    def verdict(self) -> Verdict: ...
    async def forward(
        self, rows: np.ndarray, adapters: Adapters | None = None, keep: int = 0, hidden: Hidden = "none"
    ) -> Trace: ...
    async def backward(
        self, trace: Trace, grad: np.ndarray
    ) -> tuple[np.ndarray | None, dict[str, tuple[np.ndarray, np.ndarray]]]: ...
    async def close(self) -> None: ...


class Backend(Protocol):
    """One model, run somewhere."""

    manifest: Manifest

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of what the other methods return."""

    def decoder(self, max_length: int, beams: int) -> AbstractAsyncContextManager[Decoding]:
        """Sessions whose rows are dense: all logits, fp32."""

    async def passes(self) -> Passing: ...

    async def piece(self, name: str) -> Path:
        """A piece of the model as a file, checked."""

    def close(self) -> None: ...


class NetworkBackend:
    """A model on the network, through a client."""

    def __init__(self, client: Client, model: str, verify: Policy, owned: bool) -> None:
        """owned: the client is closed with this. Raises UnknownModel, ChainError, ContentError."""
        self._client = client
        self._verify: Policy = verify
        self._owned = owned
        self._record: ModelRecord
        self._record, self.manifest = client.wait(client.asynchronous.model(model))

    @property
    def model(self) -> str:
        """The model's id, as a client takes it."""
        return "0x" + self._record.id.hex()

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        return self._client.wait(work)

    def decoder(self, max_length: int, beams: int) -> AbstractAsyncContextManager[Decoding]:
        return self._client.asynchronous.decoder(
            self.model, max_length=max_length, beams=beams, dense=True, verify=self._verify
        )

    async def passes(self) -> Passing:
        return await self._client.asynchronous.passes(self.model, verify=self._verify)

    async def piece(self, name: str) -> Path:
        return await self._client.asynchronous.network.piece(self._record, name)

    def close(self) -> None:
        if self._owned:
            self._client.close()


async def side_by_side(work: list[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, in order; all have ended when this returns or raises the first error."""
    outcomes = await asyncio.gather(*work, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
