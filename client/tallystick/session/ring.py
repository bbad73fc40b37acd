"""The ring: the last hop chooses the token and sends it straight to the first; the client checks, and confirms.

Everything that a session needs comes from the client, as in the pipeline; the ring brings a token to the first hop one
transit earlier. Where it is broken the client's own step takes its place, and it is closed again a token later.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from tallystick.session.ending import end
from tallystick_protocol.errors import CorruptResult, TallystickError
from tallystick_protocol.frames import Frame, Kind, take
from tallystick_protocol.sampling import Sampling, pick
from tallystick_protocol.types import WINDOW, Address

if TYPE_CHECKING:
    from tallystick.session.remote import Remote
    from tallystick.session.session import Session

log = logging.getLogger(__name__)

AHEAD = 2 * WINDOW
"""How far beyond the last confirmed token the ring may go on: what a client that stops reading pays for."""


class Ring:
    """Decides the tokens of one answer over an open session, as `speculation.steps.Steps` does, without drafts."""

    drafted = accepted = 0

    def __init__(self, session: Session, sampling: Sampling, ends: Collection[int], last: int) -> None:
        """ends: ids that end the answer. last: how many positions prompt and answer may take."""
        self.until = 0
        self._session = session
        self._sampling = sampling
        self._ends = list(ends)
        self._last = last
        self._closed_by: tuple[Remote, Remote] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._started = False
        self._trusted = True

    async def start(self, ids: list[int]) -> None:
        """Feed what the session does not hold. After a node was caught the rest of the answer goes without a ring."""
        self._trusted = not self._started
        self._started = True
        self._session.ring = self if self._trusted else None
        if missing := ids[len(self._session.ids) :]:
            await self._session.feed(missing)
        self._tighten(len(ids))

    async def decide(self, ids: list[int]) -> list[int]:
        """The next token."""
        return [pick(await self._session.result(len(ids) - 1), self._sampling, len(ids))]

    async def go_on(self, ids: list[int]) -> None:
        """Confirm the last token."""
        await self._session.confirm(ids[-1:])
        self._tighten(len(ids))

    async def stop(self, ids: list[int]) -> None:
        """The answer is complete: nothing goes round any more, for it ends by an end or at `last`."""
        await self.close()

    async def close(self) -> None:
        self._session.ring = None
        await end(self._closing)

    def check(self, node: Address, frame: Frame) -> None:
        """Choose again what the last hop says that it has chosen. Raises CorruptResult where that is another token."""
        if "chosen" not in frame.body:
            return
        position = frame.position + take(frame.body, "want", bytes)[-1].bit_length() - 1
        position += 8 * (len(frame.body["want"]) - 1)
        chosen, row = take(frame.body, "chosen", int), frame.rows()[-1]
        if pick(row, self._sampling, position + 1) != chosen:
            self._trusted = False
            raise CorruptResult(
                f"{node} chose another token for position {position + 1} than its logits give",
                hop=node, wrong_from=position + 1,
            )  # fmt: skip

    def _tighten(self, length: int) -> None:
        """Close the ring, where it is not, and let it go on; tokens wait for none of it."""
        ends = self._session.hops[0], self._session.hops[-1]
        is_far = length + WINDOW <= self.until or self.until >= self._last - 1
        if not self._trusted or (self._closed_by == ends and is_far):
            return
        if self._closing is not None and not self._closing.done():
            return
        self._closed_by, self.until = ends, min(self._last - 1, length + AHEAD)
        self._closing = asyncio.create_task(self._close_ring(*ends))

    async def _close_ring(self, first: Remote, last: Remote) -> None:
        """Tell the first hop whom to take tokens from, then the last one whom to send them to."""
        sampling = self._sampling
        settings: dict[str, Any] = {
            "temperature": float(sampling.temperature),
            "top_k": sampling.top_k,
            "top_p": float(sampling.top_p),
            "seed": sampling.seed,
            "min_p": float(sampling.min_p),
        }
        order = {"first": first.node, "until": self.until, "sampling": settings, "ends": self._ends}
        try:
            await first.command(Frame(Kind.RING, {"from": last.node, "until": self.until}))
            await last.command(Frame(Kind.RING, order))
        except TallystickError as error:
            log.info("the ring is not closed (%s)", error)
