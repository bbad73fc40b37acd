"""Which source to ask next: the fastest that has done nothing wrong, and another one when it takes too long."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from tallystick_protocol.content.cid import Cid
from tallystick_protocol.errors import BadBlock, BlockMissing, SourceFailed

_log = logging.getLogger(__name__)

_FIRST_PENALTY_S: Final = 2.0
_MAX_PENALTY_S: Final = 300.0
_LIE_WEIGHT: Final = 4
"""Wrong bytes count like so many failures: no honest source sends them."""
_NEWEST_WEIGHT: Final = 0.3

Ask = Callable[[str, Cid], Awaitable[bytes]]
"""Fetch a block from one source. Raises BlockMissing, BadBlock, SourceFailed."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long sources are waited for."""

    race_after_s: float = 2.0
    """Then the next source is asked too, and the first answer counts."""
    deadline_s: float = 60.0
    """Then the block is missing."""


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of one source."""

    source: str
    bytes_per_s: float | None = None
    """Smoothed over blocks; None before the first one."""
    num_blocks: int = 0
    offences: int = 0
    """Failures since the last success, lies weighted."""
    avoid_until: float = 0.0
    """On the caller's clock."""

    def succeeded(self, size_bytes: int, elapsed_s: float) -> Record:
        """After a block that was right."""
        rate = size_bytes / max(elapsed_s, 1e-6)
        old = rate if self.bytes_per_s is None else self.bytes_per_s
        smooth = old + _NEWEST_WEIGHT * (rate - old)
        return replace(self, bytes_per_s=smooth, num_blocks=self.num_blocks + 1, offences=0, avoid_until=0.0)

    def failed(self, now: float, weight: int = 1) -> Record:
        """After a failure (weight 1) or a lie; each one doubles the time it is avoided."""
        offences = self.offences + weight
        penalty = min(_FIRST_PENALTY_S * 2 ** (offences - 1), _MAX_PENALTY_S)
        return replace(self, offences=offences, avoid_until=now + penalty)

    def overtaken(self, elapsed_s: float, size_bytes: int) -> Record:
        """After another source won the race: it is at best this fast."""
        rate = size_bytes / max(elapsed_s, 1e-6)
        return replace(self, bytes_per_s=rate if self.bytes_per_s is None else min(rate, self.bytes_per_s))


def rank(records: Iterable[Record], now: float) -> list[Record]:
    """In the order to ask: those not avoided first, unknown ones before the slow; the given order breaks ties.

    An avoided source comes last, never out: it may be the only one.
    """
    return sorted(
        records,
        key=lambda r: (r.avoid_until > now, r.offences if r.avoid_until > now else 0, -(r.bytes_per_s or float("inf"))),
    )


class Sources:
    """Several sources of the same blocks, and the memory of how each behaved."""

    def __init__(
        self,
        sources: Sequence[str],
        ask: Ask,
        patience: Patience,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._records = {source: Record(source) for source in sources}
        self._ask = ask
        self._patience = patience
        self._clock = clock

    def records(self) -> tuple[Record, ...]:
        """Rate and offences of each source, in the order they were given."""
        return tuple(self._records.values())

    async def get_block(self, cid: Cid) -> bytes:
        """The block, from whichever source gives it first. Raises BlockMissing, naming each source and its reason."""
        waiting = rank(self._records.values(), self._clock())
        reasons: dict[str, str] = {}
        running: dict[asyncio.Task[bytes], tuple[str, float]] = {}
        deadline = self._clock() + self._patience.deadline_s
        try:
            while (waiting or running) and (left := deadline - self._clock()) > 0:
                if waiting:
                    source = waiting.pop(0).source
                    running[asyncio.ensure_future(self._ask(source, cid))] = (source, self._clock())
                patience_s = min(left, self._patience.race_after_s) if waiting else left
                done, _ = await asyncio.wait(running, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    source, started = running.pop(task)
                    block = self._settle(task, source, self._clock() - started, reasons)
                    if block is not None:
                        self._note_overtaken(running.values(), len(block))
                        return block
            for source, _ in running.values():
                reasons[source] = f"no answer within {self._patience.deadline_s:g} s"
                self._records[source] = self._records[source].failed(self._clock())
        finally:
            await _cancel(running)
        raise BlockMissing(cid, [f"{source}: {reason}" for source, reason in reasons.items()])

    def _settle(
        self, task: asyncio.Task[bytes], source: str, elapsed_s: float, reasons: dict[str, str]
    ) -> bytes | None:
        record, now = self._records[source], self._clock()
        try:
            block = task.result()
        except BlockMissing:
            reasons[source] = "does not hold it"
        except BadBlock as error:
            _log.warning("%s sent wrong bytes: %s", source, error)
            reasons[source] = f"sent wrong bytes: {error.message}"
            self._records[source] = record.failed(now, _LIE_WEIGHT)
        except SourceFailed as error:
            reasons[source] = error.message
            self._records[source] = record.failed(now)
        else:
            self._records[source] = record.succeeded(len(block), elapsed_s)
            return block
        return None

    def _note_overtaken(self, losers: Iterable[tuple[str, float]], size_bytes: int) -> None:
        for source, started in losers:
            self._records[source] = self._records[source].overtaken(self._clock() - started, size_bytes)


async def _cancel(tasks: Iterable[asyncio.Task[bytes]]) -> None:
    ended = list(tasks)
    for task in ended:
        task.cancel()
    await asyncio.gather(*ended, return_exceptions=True)
