"""Rows of sessions that have ended, kept for a while: a later session of the same client may go on from them (FORK)."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tallystick_node.session.record import Record
from tallystick_node.session.windows import Side
from tallystick_protocol.types import WINDOW, Address, SessionId, Span

FREE_FORKS, FORKS_PER_ROW = 64, 2
"""How often rows may be taken for nothing: every fork is copied and signed, none is paid."""


@dataclass(slots=True, eq=False)
class Source:
    """What a session holds that another one may go on from. `moving` is held while it changes or is copied.

    form: what `RowFormat.form` says of its rows; computed: rows that were computed, and paid, in this very session.
    """

    id: SessionId
    client: Address
    span: Span
    form: Any
    side: Side
    cache: Any
    record: Record
    computed: int
    moving: asyncio.Lock
    forks: int = field(default=0, init=False)

    @property
    def is_spent(self) -> bool:
        """Whether it has been forked more often than its rows pay for."""
        return self.forks >= FREE_FORKS + FORKS_PER_ROW * self.computed


class KeptRows:
    """What the sessions that ended last hold, for `keep_s` seconds; the one that was not used for longest goes first.

    The bytes that their sessions had reserved stay reserved until they go.
    """

    def __init__(
        self, keep_s: float, free: Callable[[SessionId], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """keep_s: 0 keeps nothing. free: is told what has gone."""
        self._keep_s = keep_s
        self._free = free
        self._clock = clock
        self._sources: OrderedDict[SessionId, tuple[Source, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sources)

    def keep(self, source: Source) -> bool:
        """Keep the rows of a session that has ended; False when they are not worth it."""
        if self._keep_s <= 0 or source.cache is None or len(source.record) < WINDOW:
            return False
        self._sources[source.id] = source, self._clock() + self._keep_s
        return True

    def find(self, session: SessionId) -> Source | None:
        """What a session held, if it is there still. It is then used anew."""
        self.expire()
        found = self._sources.get(session)
        if found is None:
            return None
        self._sources[session] = found[0], self._clock() + self._keep_s
        self._sources.move_to_end(session)
        return found[0]

    def expire(self) -> None:
        """Let go of what nobody has used for too long."""
        now = self._clock()
        while self._sources and next(iter(self._sources.values()))[1] <= now:
            self.evict()

    def drop(self, session: SessionId) -> None:
        """Let go of one, if it is there."""
        if self._sources.pop(session, None) is not None:
            self._free(session)

    def evict(self) -> bool:
        """Let go of the one that was not used for longest; False when there is none."""
        oldest = next(iter(self._sources), None)
        if oldest is None:
            return False
        self.drop(oldest)
        return True
