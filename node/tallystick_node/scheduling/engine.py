"""The one device thread: computes the rows that the queue picks, and whatever else needs the model.

Results do not depend on the company (canonical execution), so packing is a matter of speed alone. Everything that
touches the model runs on this thread; everybody else awaits. Nothing is locked: jobs come through a `SimpleQueue`, and
the answers to all jobs of a forward go back to their event loop in one call.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil, inf
from typing import Any, TypeVar

import torch

from tallystick_model.parts import part_of, parts_agree, threads_agree, wrong_layers
from tallystick_model.segments import Cache, Segment
from tallystick_model.span import SpanModel
from tallystick_model.stock import StockCache
from tallystick_node.scheduling.company import MOST_S, Company
from tallystick_node.scheduling.load import Load, Meter
from tallystick_node.scheduling.pieces import divides, piece_of
from tallystick_node.scheduling.policy import FairQueue, Job
from tallystick_node.scheduling.threads import Cores, Threads
from tallystick_protocol.errors import Overloaded, TallystickError, Unreachable
from tallystick_protocol.types import Span

log = logging.getLogger(__name__)

T = TypeVar("T")

STEP_ROWS, STEP_ROWS_ACCELERATOR = 96, 256
"""Rows of a forward: a client's frame of 64 and 32 steps. Measured: docs/sessions.md."""

MAX_RETRY_S = 60
MAX_PARTS = 64

STEP_WAIT_S = 120.0
"""Rows that could not be begun for so long are refused: the client goes elsewhere."""


class Withdrawn(Exception):
    """The rows were withdrawn before all of them were computed; the cache may hold the first of them."""


@dataclass(slots=True, eq=False, kw_only=True)
class _Task(Job):
    """A session's rows, which may be packed with others', or other work, which goes alone."""

    task: Segment | Callable[[], Any]
    model: SpanModel
    future: asyncio.Future[Any]
    done: int = 0
    parts: list[torch.Tensor] = field(default_factory=list)


_Answer = tuple[_Task, Any, BaseException | None]


class Engine:
    """Computes segments of sessions in the order that `FairQueue` gives them, those that wait together in one forward.

    A model whose sessions share no calls computes them one after the other, in the same order.
    """

    def __init__(self, model: SpanModel, step_rows: int = 0) -> None:
        """step_rows: rows of a forward; 0 for what suits the device. Of torch's threads, as many as there are now are
        used at most."""
        self.model = model
        on_cpu = model.placement.first.type == "cpu"
        self.step_rows = step_rows or (STEP_ROWS if on_cpu else STEP_ROWS_ACCELERATOR)
        threads = torch.get_num_threads()
        varies = threads > 1 and model.packs and threads_agree(model)
        self._threads = Threads(threads, Cores(threads) if on_cpu else None, varies=varies)
        self._company, self._gathers = Company(), model.packs and model.causal
        self.meter = Meter()
        self._queue: FairQueue[_Task] = FairQueue(self.step_rows)
        self._incoming: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._waiting: dict[int, _Task] = {}
        self.serves_parts = parts_agree(model)
        self._parts: dict[Span, SpanModel] = {}
        self._parts_lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    @property
    def load(self) -> Load:
        """What waits and how fast it goes. On the event loop."""
        waiting = list(self._waiting.values())
        return self.meter.load(len(waiting), sum(task.rows for task in waiting))

    @property
    def retry_after_s(self) -> int:
        """When somebody who is refused for lack of room may try again: when what waits now has been computed."""
        return min(max(ceil(self.load.backlog_s), 1), MAX_RETRY_S)

    def part(self, span: Span) -> SpanModel:
        """The model over some of its layers. Raises WrongLayers."""
        found = self.model if span == self.model.span else self._parts.get(span)
        if found is None and not self.serves_parts:
            raise wrong_layers(self.model, span)
        if found is None:
            found = part_of(self.model, span)
            with self._parts_lock:
                self._parts[span] = found
                if len(self._parts) > MAX_PARTS:
                    del self._parts[next(iter(self._parts))]
        return found

    async def forward(
        self, segment: Segment, payer: str = "", wait_s: float = STEP_WAIT_S, model: SpanModel | None = None
    ) -> Any:
        """The segment's result: (rows, width) float32, or (wanted rows, vocabulary) logits from the last span.

        payer: who the rows are fair to; wait_s: for how long they are wanted. model: the `part` that the session is
        over; sessions over other layers take turns with it. Long segments are computed in pieces;
        what has been computed is in the cache, also when this raises. One segment of a cache at a time.
        Cancelling the caller drops what has not begun. Raises what `SpanModel.forward` does, Overloaded when wait_s
        has passed, Withdrawn.
        """
        model = model or self.model
        return await self._submit(segment, payer, len(segment), divides(model, segment.cache), wait_s, model)

    async def run(self, work: Callable[[], T], payer: str = "", rows: int = 0) -> T:
        """The result of other work with the model, on its thread. Cancelling drops it if it has not begun.

        payer: whom it is done for, "" for the node's own work, which says nothing of the device's pace.
        rows: what it counts as; 0 for a whole forward.
        """
        result: T = await self._submit(work, payer, rows or self.step_rows, False, inf, self.model)
        return result

    def withdraw(self, cache: Cache | None, position: int = 0) -> None:
        """Nobody wants the rows any more that wait for this cache and begin at `position` or behind it.

        Their `forward` raises Withdrawn, unless it is too late: a forward in flight ends, and if it was the last one
        for these rows, they are returned. Where rows could not be taken back, nothing is withdrawn.
        """
        if cache is None or (isinstance(cache, StockCache) and cache.recurrent):
            return
        for task in self._waiting.values():
            segment = task.task
            if isinstance(segment, Segment) and segment.cache is cache and segment.first >= position:
                task.withdrawn = True

    def close(self) -> None:
        """Stop after the forward in flight. Waiting jobs fail as unreachable, and so does what comes afterwards."""
        self._closed = True
        self._incoming.put(None)
        self._thread.join(timeout=30)

    # -- on the event loop

    async def _submit(
        self,
        work: Segment | Callable[[], Any],
        payer: str,
        rows: int,
        divisible: bool,
        wait_s: float,
        model: SpanModel,
    ) -> Any:
        if self._closed:
            raise _stopping()
        future = asyncio.get_running_loop().create_future()
        deadline = time.monotonic() + wait_s
        task = _Task(payer, rows, divisible, deadline, task=work, model=model, future=future)
        self._waiting[id(task)] = task
        self._incoming.put(task)
        try:
            return await future
        finally:
            task.withdrawn = True
            del self._waiting[id(task)]

    # -- on the device thread

    def _run(self) -> None:
        while self._take_in():
            most = self._gather()
            turn = self._queue.pick(time.monotonic(), most)
            answers: list[_Answer] = [(task, None, _refusal(task)) for task in turn.refused]
            segments = [(task, count) for task, count in turn.picked if isinstance(task.task, Segment)]
            for call in _calls(segments):
                _answer(answers)
                answers = self._compute(call)
            for task, count in turn.picked:
                if not isinstance(task.task, Segment):
                    _answer(answers)
                    answers = [self._work(task, task.task, count)]
            _answer(answers)
        left = self._queue.clear()
        while not self._incoming.empty():
            late = self._incoming.get()
            left += [] if late is None else [late]
        _answer([(task, None, _stopping()) for task in left])
        self._threads.close()

    def _take_in(self) -> bool:
        """Put what has come into the queue, waiting for something if there is nothing to do; False when closed."""
        while not len(self._queue) or not self._incoming.empty():
            task = self._incoming.get()
            if task is None:
                return False
            self._queue.put(task)
        return True

    def _gather(self) -> float:
        """Let steps wait for others that are about to come, while the cores are taken; how many a forward should have
        at most."""
        if not self._gathers or not self._threads.cores_were_taken:
            return inf
        now = time.monotonic()
        end = now + MOST_S
        while (waiting := self._sessions_waiting()) and now < end:
            waits_s = self._company.waits_s(waiting, now)
            if not waits_s:
                break
            try:
                task = self._incoming.get(timeout=min(waits_s, end - now))
            except queue.Empty:
                break
            if task is None:
                self._incoming.put(None)  # `_take_in` hears of it
                return inf
            self._queue.put(task)
            now = time.monotonic()
        is_whole = self.model.is_first and self.model.is_last
        return inf if is_whole or not waiting else self._company.half(waiting, now)

    def _sessions_waiting(self) -> set[int]:
        """Whose steps wait; none if anything else does, too."""
        steps = [step for step in self._queue.steps if not step.withdrawn]
        if not self._queue.has_only_steps or not all(isinstance(step.task, Segment) for step in steps):
            return set()
        return {id(step.task.cache) for step in steps if isinstance(step.task, Segment)}

    def _compute(self, batch: Sequence[tuple[_Task, int]]) -> list[_Answer]:
        """One forward; the answers to the jobs that are complete with it, or have failed."""
        rows = sum(count for _, count in batch)
        began = time.perf_counter()
        self._threads.choose(rows)
        model = batch[0][0].model
        pieces = [piece_of(model, task.task, task.done, count) for task, count in batch]  # type: ignore[arg-type]
        try:
            results = model.forward(pieces)
        except Exception as error:
            if len(batch) > 1:  # one bad session must not fail its company
                return [answer for one in batch for answer in self._compute([one])]
            if not isinstance(error, TallystickError):
                log.exception("a forward failed")
            task = batch[0][0]
            task.withdrawn = True
            return [(task, None, error)]
        if self._gathers:
            self._company.note([id(task.task.cache) for task, _ in batch], time.monotonic())  # type: ignore[union-attr]
        took_s, share = time.perf_counter() - began, len(model.span) / len(self.model.span)
        self._threads.note(rows, took_s / share)
        self.meter.note(rows, len(batch), took_s, share)
        done = [_completed(task, count, result) for (task, count), result in zip(batch, results, strict=True)]
        return [answer for answer in done if answer is not None]

    def _work(self, task: _Task, work: Callable[[], Any], count: int) -> _Answer:
        self._threads.use_all()
        began = time.perf_counter()
        try:
            result = work()
        except Exception as error:
            if not isinstance(error, TallystickError):
                log.exception("work with the model failed")
            return task, None, error
        if task.payer:
            self.meter.note(count, 1, time.perf_counter() - began)
        return task, result, None


def _stopping() -> Unreachable:
    return Unreachable("the node is stopping")


def _calls(segments: Sequence[tuple[_Task, int]]) -> list[list[tuple[_Task, int]]]:
    """Those that share calls: sessions over the same layers, of a model whose rows travel together."""
    calls: dict[object, list[tuple[_Task, int]]] = {}
    for one in segments:
        model = one[0].model
        calls.setdefault(model.span if model.packs else id(one[0]), []).append(one)
    return list(calls.values())


def _refusal(task: _Task) -> BaseException:
    if task.withdrawn:
        return Withdrawn()
    return Overloaded("these rows waited longer than they were wanted for", retry_after_s=MAX_RETRY_S)


def _completed(task: _Task, count: int, result: torch.Tensor) -> _Answer | None:
    """Keep a piece's result; the answer when it was the last piece."""
    task.done += count
    task.parts.append(result)
    if task.rows:
        return None
    return task, task.parts[0] if len(task.parts) == 1 else torch.cat(task.parts), None


def _answer(answers: Sequence[_Answer]) -> None:
    """Hand answers to the event loops that wait for them, one call for each."""
    loops: dict[asyncio.AbstractEventLoop, list[_Answer]] = {}
    for answer in answers:
        loops.setdefault(answer[0].future.get_loop(), []).append(answer)
    for loop, its_own in loops.items():
        try:
            loop.call_soon_threadsafe(_resolve, its_own)
        except RuntimeError:
            log.debug("nobody waits any more: the event loop is closed")


def _resolve(answers: Sequence[_Answer]) -> None:
    for task, result, error in answers:
        if task.future.done():
            continue
        if error is None:
            task.future.set_result(result)
        else:
            task.future.set_exception(error)
