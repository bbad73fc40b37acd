"""Who is late: looks at a session that waits, and fails the hop that holds it up.

Each hop is measured by itself. How far it has come is what it says itself (PONG), or what results prove of everybody;
its time runs while the hop before it has computed rows that it has not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tallystick.session.patience import Patience
from tallystick.session.remote import Remote
from tallystick_protocol.errors import Unreachable

if TYPE_CHECKING:
    from tallystick.session.session import Session

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.25
STEP_FLOOR_S, STEP_LIMIT_S = 2.0, 20.0
FRAME_FLOOR_S, FRAME_LIMIT_S = 10.0, 60.0
"""A frame is what a prompt or a replay is computed in: up to 64 rows, which may wait behind those of others."""

DECODE_ROWS = 16
IDLE_S = 600.0
"""Nodes give a place away whose rows nobody has asked for during so long (docs/protocol.md, OPEN)."""


@dataclass(slots=True)
class Progress:
    """How far one node has come. since: when it had last nothing to compute, or moved.

    reached: positions that it has computed, as far as is known; furthest: the most that this ever was; signed: those
    that its receipts cover.
    """

    since: float
    reached: int = 0
    furthest: int = 0
    signed: int = 0
    _steps: Patience = field(default_factory=lambda: Patience(STEP_FLOOR_S, STEP_LIMIT_S))
    _frames: Patience = field(default_factory=lambda: Patience(FRAME_FLOOR_S, FRAME_LIMIT_S))

    def patience(self, due: int) -> Patience:
        """What is usual for what it has to compute up to position `due`."""
        return self._steps if due - self.reached <= DECODE_ROWS else self._frames

    def note(self, reached: int, due: int, now: float) -> bool:
        """It has computed so many positions of those that are due; whether that is more than ever."""
        patience, self.reached = self.patience(due), reached
        if reached > self.furthest:
            patience.note(now - self.since)
            self.furthest, self.since = reached, now
            return True
        if reached >= due:
            self.since = now
        return False

    def note_signed(self, signed: int) -> bool:
        """Its receipts cover so many positions; whether that is more than ever."""
        before, self.signed = self.signed, max(signed, self.signed)
        return self.signed > before

    def forget(self, length: int) -> None:
        """Positions from `length` on were taken back."""
        self.reached, self.furthest = min(self.reached, length), min(self.furthest, length)
        self.signed = min(self.signed, length)


class Watch:
    """Measures what a step or a frame of rows usually takes each hop. A hop is late when it takes much longer than
    that, says so itself, and neither has nor waits for money.

    moved_at: when anybody last came further or signed more, or rows were fed. longest_pause_s: between such moments.
    """

    def __init__(self, session: Session) -> None:
        self.moved_at = time.monotonic()
        self.longest_pause_s = 0.0
        self._session = session
        self._progress: dict[Remote, Progress] = {}
        self._answered = 0
        self._looked_at = 0.0
        self._failed: tuple[Remote, int] | None = None

    def fed(self, first: int) -> None:
        """Rows were fed, from position `first` on."""
        self._observe(first)
        self._moved(time.monotonic())

    def answered(self, last: int) -> None:
        """The result of position `last` has come: everybody has computed it."""
        self._answered = max(self._answered, last + 1)
        self._observe(len(self._session.ids))

    def excuse(self) -> None:
        """The client itself is at work, and nobody is held up but by it."""
        self.moved_at = time.monotonic()

    def forget(self, length: int) -> None:
        """Rows from `length` on were taken back."""
        self._answered = min(self._answered, length)
        for progress in self._progress.values():
            progress.forget(length)

    async def look(self) -> None:
        """Ask for signs of life; fail whoever gives none, and the hop that is late."""
        session, now = self._session, time.monotonic()
        if now - self._looked_at < LOOK_EVERY_S and all(one.line.is_informed for one in session.everybody()):
            return
        self._looked_at = now
        for remote in session.everybody():
            await remote.line.look()
        self._observe(len(session.ids))
        for index, hop, progress, due in self._behind():
            limit_s = progress.patience(due).limit_s
            if now - progress.since <= limit_s or hop.failure is not None:
                continue
            if hop.line.pong.at < progress.since + limit_s:
                await hop.line.ping()  # its line says when an answer takes too long
            elif hop.line.pong.unpaid:
                progress.since = now
            elif self._fail(index, f"made no progress for {limit_s:.1f} s"):
                return

    def fail_one(self, waited_s: float) -> bool:
        """Nothing has moved for very long: fail whom that is owed to. False when nobody could take its place.

        Who says that it waits for money is believed no longer, if nobody else holds it up.
        """
        session, length = self._session, len(self._session.ids)
        why = f"held the session up for {waited_s:.0f} s"
        behind = [index for index, _, _, _ in self._behind()]
        late = [index for index in behind if not session.hops[index].line.pong.unpaid]
        if not behind and session.first_missing() < length:
            late = [len(session.hops) - 1]
        if late:
            return self._fail(late[0], why)
        if not behind and (owing := session.sketching.late()) is not None:
            return self._fail(owing, why)
        for audit in session.audits:
            if audit.judged_to() < session.hops[audit.index].standing.covered:
                return self._fail_auditor(audit.remote, audit.index, why)
        signed = [hop.standing.covered for hop in session.hops]
        if not behind and min(signed) == length:
            return False
        return self._fail(behind[0] if behind else signed.index(min(signed)), why)

    def _observe(self, length: int) -> None:
        """Take in what everybody has said. length: positions that are due from the first hop."""
        session, now = self._session, time.monotonic()
        before, self._progress = self._progress, {}
        hops, due, moved = len(session.hops), length, False
        for index, remote in enumerate(session.everybody()):
            progress = self._progress[remote] = before.get(remote) or Progress(now)
            answered = self._answered if index < hops else 0
            reached = min(max(remote.line.pong.position, answered), length)
            if index == hops - 1 and reached == length and self._lacks_last():
                reached = length - 1
            moved |= progress.note(reached, due if index < hops else reached, now)
            moved |= progress.note_signed(remote.standing.covered)
            due = reached
        if moved:
            self._moved(now)

    def _moved(self, now: float) -> None:
        self.longest_pause_s = max(self.longest_pause_s, now - self.moved_at)
        self.moved_at = now

    def _lacks_last(self) -> bool:
        session = self._session
        return bool(session.want) and session.want[-1] and len(session.want) - 1 not in session.results.rows

    def _behind(self) -> Iterator[tuple[int, Remote, Progress, int]]:
        """The hops that have not computed what those before them have: with index, progress and what is due."""
        due = len(self._session.ids)
        for index, hop in enumerate(self._session.hops):
            progress = self._progress.get(hop)
            if progress is None:
                return  # it has just taken somebody's place
            if progress.reached < due:
                yield index, hop, progress, due
            due = progress.reached

    def _fail(self, index: int, why: str) -> bool:
        """A hop is late; False when nobody could take its place. The one before is at fault if another one was late
        behind it with the same rows: it may say that it has computed them, and keep them."""
        session, has_stand_in = self._session, self._session.repair.has_stand_in
        before = (session.hops[index - 1], len(session.ids)) if index else None
        if before is not None and before == self._failed and has_stand_in(index - 1):
            index -= 1
        if not has_stand_in(index):
            return False
        hop, self._failed = session.hops[index], before
        log.info("%s is late: it %s", hop.node, why)
        hop.failure = hop.failure or Unreachable(f"{hop.node} {why}", hop=hop.node)
        return True

    def _fail_auditor(self, remote: Remote, index: int, why: str) -> bool:
        if not self._session.openings.draw_auditors(index, {remote.node}):
            return False
        remote.failure = remote.failure or Unreachable(f"{remote.node} {why}", hop=remote.node)
        return True
