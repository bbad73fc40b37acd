"""Whose rows go next: a pure queue, fair between payers, which knows nothing of threads, tensors or clocks.

Fairness is start-time fair queueing (Goyal, Vin and Cheng, 1996) over payers, counted in rows: every payer has a tag,
which grows by the rows that are computed for it; who comes back from being idle starts at the tag that was served last,
so that idleness saves nothing up. Of those that wait, the smallest tag goes first.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from typing import Generic, TypeVar

MAX_STEP_ROWS = 16
"""Rows of a step at most, drafts included; what has more is bulk: a prompt, a replay, a pass."""

BULK_SHARE = 4
"""While bulk waits, steps leave it one row in so many."""


@dataclass(slots=True, eq=False)
class Job:
    """Rows that belong together and wait to be computed.

    rows: how many are left; divisible: whether they may be computed in pieces; deadline: when nobody wants them any
    more, on the caller's clock. `withdrawn` may be set at any time: what has not been picked then never is.
    """

    payer: str
    rows: int
    divisible: bool = True
    deadline: float = inf
    withdrawn: bool = False


J = TypeVar("J", bound=Job)


@dataclass(slots=True)
class Turn(Generic[J]):
    """What `pick` decided: jobs with the number of rows of each to be computed; jobs that left without."""

    picked: list[tuple[J, int]] = field(default_factory=list)
    refused: list[J] = field(default_factory=list)


class _Line(Generic[J]):
    """One payer's jobs, each kind in the order of arrival."""

    __slots__ = ("bulk", "order", "steps", "tag")

    def __init__(self, tag: float, order: int) -> None:
        self.tag = tag
        self.order = order  # which of two equal tags goes first: who was not served for longer
        self.steps: deque[J] = deque()
        self.bulk: deque[J] = deque()

    def __lt__(self, other: _Line[J]) -> bool:
        return (self.tag, self.order) < (other.tag, other.order)

    @property
    def waits(self) -> bool:
        return bool(self.steps or self.bulk)


class FairQueue(Generic[J]):
    """The jobs that wait. `pick` gives the rows of the next forward: steps first, then bulk, cut to what is left.

    While a payer is left waiting, nobody else gets more than four budgets and two jobs more than it, however many
    sessions it has; within that, steps go before bulk. So no job waits for ever.
    """

    def __init__(self, budget: int) -> None:
        """budget: rows of a forward, two steps at least. An indivisible job may exceed it, without other bulk then."""
        self.budget = max(budget, 2 * MAX_STEP_ROWS)
        self._lines: dict[str, _Line[J]] = {}
        self._clock = 0.0
        self._served = 0
        self._num_jobs = 0

    def __len__(self) -> int:
        return self._num_jobs

    @property
    def has_only_steps(self) -> bool:
        """Whether no bulk waits."""
        return not any(line.bulk for line in self._lines.values())

    @property
    def steps(self) -> list[J]:
        """Those that wait."""
        return [job for line in self._lines.values() for job in line.steps]

    def put(self, job: J) -> None:
        """Take a job in."""
        line = self._lines.get(job.payer)
        if line is None:
            line = self._lines[job.payer] = _Line(self._clock, self._next())
        elif not line.waits:
            line.tag = max(line.tag, self._clock)
        (line.steps if job.rows <= MAX_STEP_ROWS else line.bulk).append(job)
        self._num_jobs += 1

    def pick(self, now: float, most_steps: float = inf) -> Turn[J]:
        """The next forward's rows. A job whose rows are all picked has left; others keep their place.

        most_steps: how many steps are picked at most.

        Jobs that are withdrawn, or whose deadline is before `now`, leave as refused.
        """
        turn: Turn[J] = Turn(refused=list(self._leaving(now)))
        waiting = [line for line in self._lines.values() if line.waits]
        if waiting:
            furthest = min(line.tag for line in waiting) + self.budget
            lines = [line for line in waiting if line.tag <= furthest]  # who is ahead waits for the others to catch up
            bulk = [line for line in lines if line.bulk]
            aside = -(-self.budget // BULK_SHARE) if bulk else 0
            room = self._pick_steps(turn, [line for line in lines if line.steps], aside, furthest, most_steps)
            self._pick_bulk(turn, bulk, room)
        self._num_jobs -= len(turn.refused) + sum(not job.rows for job, _ in turn.picked)
        self._forget_idle()
        return turn

    def clear(self) -> list[J]:
        """Take everything out."""
        jobs = [job for line in self._lines.values() for job in (*line.steps, *line.bulk)]
        self._lines.clear()
        self._num_jobs = 0
        return jobs

    def _forget_idle(self) -> None:
        """Drop the lines of payers that would start anew with the tag that they have; all, when nobody waits."""
        if not self._num_jobs:
            self._clock = max([self._clock, *(line.tag for line in self._lines.values())])
            self._lines.clear()
        elif len(self._lines) > 1:
            self._lines = {payer: line for payer, line in self._lines.items() if line.waits or line.tag > self._clock}

    def _leaving(self, now: float) -> Iterator[J]:
        for line in self._lines.values():
            for jobs in (line.steps, line.bulk):
                gone = [job for job in jobs if job.withdrawn or job.deadline < now]
                for job in gone:
                    jobs.remove(job)
                yield from gone

    def _pick_steps(self, turn: Turn[J], lines: list[_Line[J]], aside: int, furthest: float, most: float) -> int:
        """Steps, the smallest tag first, none beyond `furthest`; returns the room that is left."""
        room = self.budget
        heapq.heapify(lines)
        while lines and lines[0].tag <= furthest and len(turn.picked) < most:
            line = lines[0]
            job = line.steps[0]
            if job.rows > room - aside and turn.picked:
                break
            line.steps.popleft()
            room -= job.rows
            self._take(turn, line, job, job.rows)
            if line.steps:
                heapq.heapreplace(lines, line)
            else:
                heapq.heappop(lines)
        return room

    def _pick_bulk(self, turn: Turn[J], lines: list[_Line[J]], room: int) -> None:
        """Bulk, the smallest tag first, until the budget is full."""
        heapq.heapify(lines)
        full = room
        while lines and room > 0:
            line = lines[0]
            job = line.bulk[0]
            count = min(job.rows, room) if job.divisible else job.rows
            if count > room and room < full:
                break
            room -= count
            self._take(turn, line, job, count)
            if job.rows:
                break
            line.bulk.popleft()
            if line.bulk:
                heapq.heapreplace(lines, line)
            else:
                heapq.heappop(lines)

    def _take(self, turn: Turn[J], line: _Line[J], job: J, count: int) -> None:
        turn.picked.append((job, count))
        job.rows -= count
        self._clock = max(self._clock, line.tag)
        line.tag += count
        line.order = self._next()

    def _next(self) -> int:
        self._served += 1
        return self._served
