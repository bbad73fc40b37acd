"""What a task needs of whoever computes: a pass over a whole stack, and a decoder whose beams fork."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar

import numpy as np

from tallystick.routing.candidates import Candidate
from tallystick.tokens import Tokens
from tallystick.verdict import Policy, Verdict
from tallystick_protocol.chain.reads import ModelRecord
from tallystick_protocol.errors import ConfigError, ContextLengthExceeded, CorruptResult
from tallystick_protocol.manifest import Manifest, Output

Row: TypeAlias = "np.ndarray | tuple[np.ndarray, np.ndarray]"
"""Dense: (vocab,) fp32 logits. Else: ids (k,) and logits (k,) of the k largest, descending."""

Want = Literal["last", "all", "none"]


class Encoded(Protocol):
    """What one pass returned. rows: (wanted positions, values) fp32."""

    @property
    def rows(self) -> np.ndarray: ...

    @property
    def route(self) -> list[Candidate]: ...

    @property
    def verdict(self) -> Verdict: ...


class Decoder(Protocol):
    """An open causal session and its forks, one a beam. Any call may raise `tallystick.session.repair.RolledBack`."""

    verdict: Verdict
    manifest: Manifest

    @property
    def route(self) -> list[Candidate]: ...

    async def feed(self, ids: list[int], *, beam: int = 0, want: Want = "last") -> None:
        """Append ids to a beam; rows come back for the last position, for all, or for none."""

    async def row(self, position: int, *, beam: int = 0) -> Row:
        """The row that left the model at a position of a beam; it has been wanted."""

    async def crop(self, length: int, *, beam: int = 0) -> None:
        """Keep the first `length` positions of a beam."""

    async def reorder(self, parents: list[int]) -> None:
        """Beam i goes on from what beam parents[i] holds; there are as many parents as beams."""

    async def finish(self) -> None:
        """Receipts settled, audited as the policy says, paid."""


class Library(Protocol):
    """Where tokenizers come from."""

    async def tokens(self, record: ModelRecord) -> Tokens: ...


class Backend(Protocol):
    """What the tasks are methods of: `tallystick.AsyncClient`."""

    @property
    def network(self) -> Library: ...

    async def model(self, text: str) -> tuple[ModelRecord, Manifest]:
        """A model by id, by part of an id or by name; empty for the only one."""

    async def run(
        self,
        model: str,
        ids: list[int],
        *,
        token_types: list[int] | None = None,
        want: list[int] | None = None,
        verify: Policy = "audit",
    ) -> Encoded:
        """One pass over a whole one-stack model, or over an encoder-decoder's encoder (rows: its last hidden states).

        want: the positions whose rows come back, ascending; None for all (of a "label" model: the last).
        """

    def decoder(
        self,
        model: str,
        *,
        max_length: int,
        beams: int = 1,
        dense: bool = False,
        memory: np.ndarray | None = None,
        verify: Policy = "audit",
    ) -> AbstractAsyncContextManager[Decoder]:
        """Open a causal session of at most `max_length` positions. memory: (m, width) fp32 encoder states."""


T = TypeVar("T")


class Answers(list[T], Generic[T]):
    """The results of a task, as the Hugging Face task schema writes them, with the route and the verdict on them.

    route: the nodes that carried it, first hop first; of an encoder-decoder the encoder's and then the decoder's, of
    a text in several windows the last one's. verdict: on all sessions that it took.
    """

    def __init__(self, results: list[T], route: list[Candidate], verdict: Verdict) -> None:
        super().__init__(results)
        self.route = route
        self.verdict = verdict


TaskAnswers: TypeAlias = "Answers[dict[str, Any]]"


@dataclass(frozen=True, slots=True)
class Served:
    """A model that was looked up: its id as text, its manifest, its tokenizer."""

    id: str
    manifest: Manifest
    tokens: Tokens


async def look_up(backend: Backend, model: str, outputs: tuple[Output, ...], task: str) -> Served:
    """Find a model that gives one of `outputs`. Raises ConfigError when it gives something else, UnknownModel…"""
    record, manifest = await backend.model(model)
    if manifest.output not in outputs:
        raise ConfigError(f"{manifest.name} is a model for {manifest.task}: it gives {manifest.output}, not {task}")
    return Served("0x" + record.id.hex(), manifest, await backend.network.tokens(record))


def check_ids(manifest: Manifest, ids: Iterable[object]) -> None:
    """Raises ConfigError for what is no token id of the model."""
    for token in ids:
        if type(token) is not int or not 0 <= token < manifest.vocab:
            raise ConfigError(f"token id {str(token)[:20]} is not one of the {manifest.vocab} in the vocabulary")


def check_length(manifest: Manifest, positions: int) -> None:
    """Raises ContextLengthExceeded for more positions than the model has."""
    if positions > manifest.max_length:
        raise ContextLengthExceeded(
            f"{manifest.name} takes {manifest.max_length} positions, not {positions}: shorten the text, or use truncate"
            " or stride where the task has them",
            limit=manifest.max_length,
        )


def check_rows(rows: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The rows as float32. Raises CorruptResult when they are not `shape` finite numbers: they come from strangers."""
    if rows.shape != shape or not bool(np.isfinite(rows).all()):
        raise CorruptResult(f"a result of shape {rows.shape} that is not {shape} finite numbers")
    return rows.astype(np.float32, copy=False)


def merge(verdicts: list[Verdict]) -> Verdict:
    """One verdict on an answer that took several sessions."""
    total = Verdict(verdicts[0].policy)
    for verdict in verdicts:
        total.receipts += verdict.receipts
        total.checks += verdict.checks
        total.accusations += verdict.accusations
        total.attributions += verdict.attributions
        total.replaced += verdict.replaced
        total.unverifiable += verdict.unverifiable
        total.unaudited += verdict.unaudited
        total.unproven += [one for one in verdict.unproven if one not in total.unproven]
        total.not_slashable += verdict.not_slashable
        total.moved += verdict.moved
        for node, paid in verdict.paid.items():
            total.paid[node] = type(paid)(total.paid.get(node, 0) + paid)
        for node, withheld in verdict.withheld.items():
            total.withheld[node] = type(withheld)(total.withheld.get(node, 0) + withheld)
        total.came_near(verdict.worst_error, verdict.tolerance)
    return total
