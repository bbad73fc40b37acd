"""`past_key_values` of a served model: sessions at nodes, or the rows themselves where passes run them anew.

Columns are what transformers counts, padding included; a row of the batch is a session (or a list of rows) that holds
the columns of it that the attention mask shows, and no others.
"""

from __future__ import annotations

import contextlib
import hashlib
from abc import abstractmethod
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache

from tallystick.session.repair import RolledBack
from tallystick.torch.backend import Backend, Decoding, side_by_side
from tallystick.verdict import Verdict
from tallystick_protocol.errors import ContextLengthExceeded, CorruptResult

REOPENINGS = 4
"""How often a batch's sessions are opened anew because a node was caught, before that is an error."""


class Overturned(Exception):
    """A node was caught, and logits that were used already were wrong: what was generated from them is void."""


class NetworkCache(Cache):
    """What both kinds share: which columns are real."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.shown: list[list[bool]] = []

    @property
    def batch_size(self) -> int:
        return len(self.shown) or -1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns held, padding included."""
        return len(self.shown[0]) if self.shown else 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def is_croppable(self) -> bool:
        return True

    def num_rows(self, index: int) -> int:
        """Positions that a row of the batch holds: its columns without padding."""
        return sum(self.shown[index])

    def show(self, columns: torch.Tensor) -> None:
        """New columns (batch, n) are held: which are real."""
        self.shown = self.shown or [[] for _ in range(len(columns))]
        for row, new in zip(self.shown, columns.tolist(), strict=True):
            row += [bool(shown) for shown in new]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget so many last columns: transformers passes the number negated. Raises ValueError."""
        count = abs(tokens_to_remove)
        if count > self.get_seq_length():
            raise ValueError(f"cannot remove {count} of {self.get_seq_length()} columns")
        if count:
            self.shown = [row[:-count] for row in self.shown]
            self._crop([sum(row) for row in self.shown])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i of the batch goes on from what row beam_idx[i] holds."""
        self._select([int(parent) for parent in beam_idx])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select([row for row in range(len(self.shown)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        kept = torch.arange(len(self.shown))[indices]
        self._select([int(row) for row in kept])

    def reset(self) -> None:
        self.crop(-self.get_seq_length())

    def _select(self, parents: list[int]) -> None:
        self._take(parents)
        self.shown = [list(self.shown[parent]) for parent in parents]

    @abstractmethod
    def _crop(self, lengths: list[int]) -> None:
        """Keep so many positions of each row of the batch."""

    @abstractmethod
    def _take(self, parents: list[int]) -> None:
        """The batch becomes these rows of itself; there may be more or fewer of them than before."""

    def settle(self) -> None:
        """Have everything checked and paid, and end. Raises Overturned."""

    def close(self) -> None:
        """End without further checks."""


class SessionCache(NetworkCache):
    """Sessions at nodes, one per row of the batch."""

    def __init__(self, backend: Backend, max_length: int, on_verdict: Callable[[Verdict], None]) -> None:
        """max_length: positions that each session is opened for; more are possible and open new ones."""
        super().__init__()
        self._backend = backend
        self._max_length = max_length
        self._on_verdict = on_verdict
        self._ids: list[list[int]] = []
        self._used: list[dict[int, bytes]] = []  # digests of the logits that were handed out
        self._decoder: Decoding | None = None
        self._stack = contextlib.AsyncExitStack()

    def extend(self, ids: list[list[int]], wanted: list[int]) -> list[torch.Tensor]:
        """Append ids to each row of the batch (perhaps none); returns the logits (wanted[row], vocab) of the last ones.

        Raises Overturned, CorruptResult, ContextLengthExceeded, and what sessions raise.
        """
        return self._repaired(lambda: self._extend(ids, wanted))

    async def _extend(self, ids: list[list[int]], wanted: list[int]) -> list[torch.Tensor]:
        self._ids = self._ids or [[] for _ in ids]
        self._used = self._used or [{} for _ in ids]
        longest = max(len(old) + len(new) for old, new in zip(self._ids, ids, strict=True))
        if self._decoder is None or longest > self._max_length:
            await self._reopen(longest, checked=False)
        before = [len(old) for old in self._ids]
        rows = await side_by_side([self._step(*step) for step in zip(range(len(ids)), ids, wanted, strict=True)])
        for index, (start, new, found) in enumerate(zip(before, ids, rows, strict=True)):
            self._ids[index] += new
            first = start + len(new) - len(found)
            self._used[index] |= {first + offset: _digest(row) for offset, row in enumerate(found)}
        vocab = self._backend.manifest.vocab
        return [torch.from_numpy(np.array(found, np.float32).reshape(-1, vocab)) for found in rows]

    async def _step(self, beam: int, ids: list[int], wanted: int) -> list[np.ndarray]:
        assert self._decoder is not None
        early, late = ids[: len(ids) - wanted], ids[len(ids) - wanted :]
        if early:
            await self._decoder.feed(early, beam=beam, want="none")
        if late:
            await self._decoder.feed(late, beam=beam, want="all")
        first = len(self._ids[beam]) + len(early)
        return [_dense(await self._decoder.row(first + at, beam=beam)) for at in range(len(late))]

    def _repaired(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """What `work` gives; when a node was caught, the sessions open anew and it is begun again."""

        async def attempt() -> Any:
            for _ in range(REOPENINGS):
                try:
                    return await work()
                except RolledBack:
                    await self._reopen_checked()
            raise CorruptResult(f"{REOPENINGS} nodes were caught in one generation; ask again later")

        return self._backend.wait(attempt())

    async def _reopen_checked(self) -> None:
        for _ in range(REOPENINGS):
            try:
                await self._reopen(max((len(ids) for ids in self._ids), default=0), checked=True)
                return
            except RolledBack:
                continue
        raise CorruptResult("one node after the other was caught; ask again later")

    async def _reopen(self, longest: int, checked: bool) -> None:
        """New sessions with what the old ones held. checked: compare the logits that were handed out before."""
        limit = self._backend.manifest.max_length
        if longest > limit:
            raise ContextLengthExceeded(f"{longest} positions; this model takes {limit}", limit=limit)
        if self._decoder is not None and not checked:
            await self._decoder.finish()
        await self._leave()
        while self._max_length < longest:
            self._max_length = min(2 * self._max_length, limit)
        opening = self._backend.decoder(min(self._max_length, limit), len(self._ids))
        self._decoder = decoder = await self._stack.enter_async_context(opening)
        self._on_verdict(decoder.verdict)
        want = "all" if checked else "none"
        held = [(beam, ids) for beam, ids in enumerate(self._ids) if ids]
        await side_by_side([decoder.feed(ids, beam=beam, want=want) for beam, ids in held])  # type: ignore[arg-type]
        for beam, used in enumerate(self._used) if checked else ():
            for position, digest in used.items():
                if _digest(_dense(await decoder.row(position, beam=beam))) != digest:
                    raise Overturned

    def _crop(self, lengths: list[int]) -> None:
        async def work() -> None:
            for beam, length in enumerate(lengths):
                if length < len(self._ids[beam]) and self._decoder is not None:
                    await self._decoder.crop(length, beam=beam)
                self._forget(beam, length)

        self._repaired(work)

    def _forget(self, beam: int, length: int) -> None:
        del self._ids[beam][length:]
        self._used[beam] = {position: digest for position, digest in self._used[beam].items() if position < length}

    def _take(self, parents: list[int]) -> None:
        async def work() -> None:
            if self._decoder is not None and len(parents) == len(self._ids) and parents != list(range(len(parents))):
                await self._decoder.reorder(parents)

        self._repaired(work)
        same = len(parents) == len(self._ids)
        self._ids = [list(self._ids[parent]) for parent in parents]
        self._used = [dict(self._used[parent]) for parent in parents]
        if not same and self._decoder is not None:  # a batch of another size takes other sessions
            self._repaired(self._end)

    async def _end(self) -> None:
        if self._decoder is not None:
            await self._decoder.finish()
        await self._leave()

    async def _leave(self) -> None:
        self._decoder = None
        await self._stack.aclose()

    def settle(self) -> None:
        self._repaired(self._end)

    def close(self) -> None:
        self._backend.wait(self._leave())


class ReplayCache(NetworkCache):
    """The rows themselves, each ids (n,) or embeddings (n, width): every pass runs all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[torch.Tensor] = []

    def joined(self, rows: list[torch.Tensor], embed: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        """What is held and what is new; `embed` makes embeddings of ids where one of both is embeddings."""
        if not self.rows:
            return rows
        return [_joined(old, new, embed) for old, new in zip(self.rows, rows, strict=True)]

    def _crop(self, lengths: list[int]) -> None:
        self.rows = [row[:length] for row, length in zip(self.rows, lengths, strict=True)]

    def _take(self, parents: list[int]) -> None:
        self.rows = [self.rows[parent] for parent in parents]


def _joined(old: torch.Tensor, new: torch.Tensor, embed: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    if old.is_floating_point() != new.is_floating_point():
        old, new = (row if row.is_floating_point() else embed(row) for row in (old, new))
    return torch.cat([old, new])


def _dense(row: Any) -> np.ndarray:
    if not isinstance(row, np.ndarray):
        raise CorruptResult("top-k rows came where dense ones were asked for")
    return row


def _digest(row: np.ndarray) -> bytes:
    return hashlib.sha256(row.tobytes()).digest()
