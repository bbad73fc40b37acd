"""The one device thread: packs the steps of waiting sessions into one forward of the span.

Results do not depend on the company (canonical execution), so packing is a matter of speed alone. Everything that
touches the model runs on this thread; everybody else awaits.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from tallystick_model.segments import Segment
from tallystick_model.span import SpanModel
from tallystick_protocol.errors import TallystickError, Unreachable

log = logging.getLogger(__name__)

T = TypeVar("T")
MAX_PACKED_ROWS = 256


@dataclass(frozen=True, slots=True)
class _Job:
    """A session's rows, which may be packed with others', or other work, which goes alone."""

    task: Segment | Callable[[], Any]
    done: Callable[[Any, BaseException | None], None]
    cancelled: threading.Event

    @property
    def num_rows(self) -> int:
        """Rows that it brings into a packed forward; work that goes alone fills one."""
        return len(self.task) if isinstance(self.task, Segment) else MAX_PACKED_ROWS


class Engine:
    """Runs segments of sessions, in the order in which they came, several in one forward when several wait."""

    def __init__(self, model: SpanModel) -> None:
        self.model = model
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        return self._jobs.qsize()

    @property
    def row_bytes(self) -> int:
        """Cache bytes that one position of a session takes (fp32).

        Where the model's own attention keeps them in transformers' cache, keys and values are taken to be as wide as
        hidden rows in every layer.
        """
        model = self.model
        if not model.causal:
            return 0
        return model.row_bytes or 8 * model.manifest.width * (model.span.end - model.span.start)

    async def forward(self, segment: Segment) -> Any:
        """The segment's result: (rows, width) float32, or (wanted rows, vocabulary) logits from the last span.

        Cancelling the caller drops the work if it has not begun.
        """
        return await self._submit(segment)

    async def run(self, work: Callable[[], T]) -> T:
        """The result of other work with the model, on its thread. Cancelling drops it if it has not begun."""
        result: T = await self._submit(work)
        return result

    async def _submit(self, task: Segment | Callable[[], Any]) -> Any:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        cancelled = threading.Event()

        def resolve(result: Any, error: BaseException | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        def done(result: Any, error: BaseException | None) -> None:
            loop.call_soon_threadsafe(resolve, result, error)

        self._jobs.put(_Job(task, done, cancelled))
        try:
            return await future
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def close(self) -> None:
        """Stop after the forward in flight. Waiting jobs fail as unreachable."""
        self._jobs.put(None)
        self._thread.join(timeout=30)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            batch = [job]
            rows = job.num_rows
            while rows < MAX_PACKED_ROWS and not self._jobs.empty():
                following = self._jobs.get()
                if following is None:
                    self._jobs.put(None)
                    break
                batch.append(following)
                rows += following.num_rows
            waiting = [job for job in batch if not job.cancelled.is_set()]
            self._compute([job for job in waiting if isinstance(job.task, Segment)])
            for job in waiting:
                if not isinstance(job.task, Segment):
                    self._work(job, job.task)
        while not self._jobs.empty():
            left = self._jobs.get()
            if left is not None:
                left.done(None, Unreachable("the node is stopping"))

    def _work(self, job: _Job, work: Callable[[], Any]) -> None:
        try:
            job.done(work(), None)
        except TallystickError as error:
            job.done(None, error)
        except Exception as error:
            log.exception("work with the model failed")
            job.done(None, error)

    def _compute(self, batch: list[_Job]) -> None:
        if not batch:
            return
        try:
            results = self.model.forward([job.task for job in batch if isinstance(job.task, Segment)])
        except TallystickError as error:
            if len(batch) == 1:
                batch[0].done(None, error)
                return
            for job in batch:  # one bad session must not fail its company
                self._compute([job])
        except Exception as error:
            log.exception("a forward of %d sessions failed", len(batch))
            for job in batch:
                job.done(None, error)
        else:
            for job, result in zip(batch, results, strict=True):
                job.done(result, None)
