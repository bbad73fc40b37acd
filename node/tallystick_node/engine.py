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
from typing import Any

from tallystick_model.segments import Segment
from tallystick_model.span import SpanModel
from tallystick_protocol.errors import TallystickError, Unreachable

log = logging.getLogger(__name__)

MAX_PACKED_ROWS = 256


@dataclass(frozen=True, slots=True)
class _Job:
    segment: Segment
    done: Callable[[Any, BaseException | None], None]
    cancelled: threading.Event


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

    async def forward(self, segment: Segment) -> Any:
        """The segment's result: (rows, width) float32, or (wanted rows, vocabulary) logits from the last span.

        Cancelling the caller drops the work if it has not begun.
        """
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

        self._jobs.put(_Job(segment, done, cancelled))
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
            rows = len(job.segment)
            while rows < MAX_PACKED_ROWS and not self._jobs.empty():
                following = self._jobs.get()
                if following is None:
                    self._jobs.put(None)
                    break
                batch.append(following)
                rows += len(following.segment)
            self._compute([waiting for waiting in batch if not waiting.cancelled.is_set()])
        while not self._jobs.empty():
            left = self._jobs.get()
            if left is not None:
                left.done(None, Unreachable("the node is stopping"))

    def _compute(self, batch: list[_Job]) -> None:
        if not batch:
            return
        try:
            results = self.model.forward([job.segment for job in batch])
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
