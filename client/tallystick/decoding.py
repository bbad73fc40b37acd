"""Generation with the reins in one's own hands: several continuations side by side, fed, cropped and forked at will.

What `Stream` does for one answer, beam search, transformers' `generate` and whoever drafts ahead do through this.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Literal

import numpy as np

from tallystick.routing.candidates import Candidate
from tallystick.session.session import Session
from tallystick.verdict import Verdict
from tallystick_protocol.errors import ConfigError
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.sampling import parse_top_k

Row = np.ndarray | tuple[np.ndarray, np.ndarray]
"""Dense: (values,) fp32. Else the ids (k,) u32 and logits (k,) fp32 of the k largest, by value descending."""

Want = Literal["last", "all", "none"]
MAX_BEAMS = 32


class Decoder:
    """Several sessions of one model on one route. Use as an async context manager; `manifest` is there from then on.

    Every method may raise NoRoute, Unreachable and `RolledBack`: a node was caught, and what was fed to that beam from
    the position on is forgotten; start again in a new decoder, which avoids that node.
    """

    def __init__(
        self,
        verdict: Verdict,
        beams: int,
        dense: bool,
        open_sessions: Callable[[int], Awaitable[tuple[Manifest, list[Session]]]],
        finish: Callable[[Session], Awaitable[None]],
        leave: Callable[[], None],
    ) -> None:
        """open_sessions, finish: the client's. leave: called when the decoder is closed."""
        if not 0 < beams <= MAX_BEAMS:
            raise ConfigError(f"{beams} beams; 1 to {MAX_BEAMS} are possible")
        self.verdict = verdict
        self._count = beams
        self._dense = dense
        self._open_sessions = open_sessions
        self._finish = finish
        self._leave = leave
        self._sessions: list[Session] = []
        self.manifest: Manifest

    async def __aenter__(self) -> Decoder:
        self.manifest, self._sessions = await self._open_sessions(self._count)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for session in self._sessions:
            await session.close()
        self._leave()

    @property
    def route(self) -> list[Candidate]:
        """The nodes of the first beam, first hop first."""
        return list(self._sessions[0].route)

    def length(self, beam: int = 0) -> int:
        """Positions that a beam holds."""
        return len(self._sessions[beam].ids)

    async def feed(self, ids: list[int], *, beam: int = 0, want: Want = "last") -> None:
        """Append token ids to a beam; `want`: the positions whose rows can be asked for afterwards."""
        if not ids:
            raise ConfigError("nothing to feed")
        flags = [want == "all" or (want == "last" and at == len(ids) - 1) for at in range(len(ids))]
        await self._sessions[beam].feed(list(ids), flags)

    async def row(self, position: int, *, beam: int = 0) -> Row:
        """What left the model at a position that was wanted: the logits for the token after it."""
        row = await self._sessions[beam].result(position)
        return np.frombuffer(row, dtype="<f4") if self._dense else parse_top_k(row)

    async def crop(self, length: int, *, beam: int = 0) -> None:
        """Forget a beam's positions from `length` on."""
        await self._sessions[beam].rewinding.crop(length)

    async def reorder(self, parents: list[int]) -> None:
        """Beam i goes on from what beam parents[i] holds. Sessions are forked at the nodes; nothing is computed."""
        if len(parents) != len(self._sessions) or not all(0 <= parent < len(parents) for parent in parents):
            raise ConfigError(f"reorder names one of {len(self._sessions)} beams for each of them")
        placed: list[Session | None] = [None] * len(parents)
        for parent in set(parents):  # a beam that goes on stays where it is, in its first child
            placed[parents.index(parent)] = self._sessions[parent]
        spare = [session for beam, session in enumerate(self._sessions) if beam not in parents]
        forks = []
        for beam, parent in enumerate(parents):
            if placed[beam] is None:
                placed[beam] = session = spare.pop()
                forks.append((session, self._sessions[parent]))
        self._sessions = [session for session in placed if session is not None]
        for source in {source.id: source for _, source in forks}.values():
            await source.rewinding.computed()
        await asyncio.gather(
            *(session.rewinding.fork_from(source, _shared(session, source)) for session, source in forks)
        )

    async def finish(self) -> None:
        """Have everything signed, audited as the policy says, and paid."""
        for session in self._sessions:
            await self._finish(session)


def _shared(one: Session, other: Session) -> int:
    """How many first positions of two sessions hold the same ids."""
    return next((at for at, (a, b) in enumerate(zip(one.ids, other.ids, strict=False)) if a != b),
                min(len(one.ids), len(other.ids)))  # fmt: skip
