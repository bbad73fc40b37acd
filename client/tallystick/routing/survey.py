"""Asking many nodes at once, most of which may be dead: as long as it pays, and not for all of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from tallystick.routing.candidates import Candidate

T = TypeVar("T")
A = TypeVar("A")

AT_ONCE = 400
"""Questions on their way at a time; each takes a socket."""

LEAST_WAIT_S = 0.05
PER_LAYER = 3
"""A layer is well served by so many operators: then who does not answer is not waited for."""


class Round(Generic[T, A]):
    """One question to many. Questions that are left unanswered go on; `answers` grows until `close`."""

    def __init__(self, asked: Sequence[T], ask: Callable[[T], Awaitable[A]], at_once: int = AT_ONCE) -> None:
        """asked: in the order in which to ask. ask: answers in a bounded time, and does not raise."""
        self.answers: dict[int, A] = {}
        self._asked, self._ask = asked, ask
        self._next = 0
        self._came = asyncio.Event()
        self._askers = [asyncio.create_task(self._keep_asking()) for _ in range(min(at_once, len(asked)))]

    async def settle(self, enough: Callable[[list[A]], bool]) -> list[A]:
        """The answers that came until there were enough, and for as long again: who is twice as far is not missed.

        All of them where they never suffice. What comes later is in `answers`.
        """
        began, deadline, counted = time.monotonic(), float("inf"), 0
        while len(self.answers) < len(self._asked) and time.monotonic() < deadline:
            self._came.clear()
            if deadline == float("inf") and len(self.answers) > counted:
                counted = len(self.answers)
                if enough(list(self.answers.values())):
                    now = time.monotonic()
                    deadline = now + max(now - began, LEAST_WAIT_S)
            try:
                async with asyncio.timeout(None if deadline == float("inf") else deadline - time.monotonic()):
                    await self._came.wait()
            except TimeoutError:
                break
        return list(self.answers.values())

    def unanswered(self) -> list[T]:
        return [one for index, one in enumerate(self._asked) if index not in self.answers]

    async def close(self) -> None:
        """Ask no more; what is on its way is dropped."""
        for task in self._askers:
            task.cancel()
        await asyncio.gather(*self._askers, return_exceptions=True)

    async def _keep_asking(self) -> None:
        while self._next < len(self._asked):
            index, self._next = self._next, self._next + 1
            self.answers[index] = await self._ask(self._asked[index])
            self._came.set()


def well_served(candidates: Sequence[Candidate], num_layers: int, per_layer: int = PER_LAYER) -> bool:
    """Whether every layer is offered by so many operators, of one numeric class."""
    operators: dict[bytes, list[set[str]]] = {}
    for candidate in candidates:
        if candidate.offer.end > num_layers:
            continue
        served = operators.setdefault(candidate.offer.numeric_class, [set() for _ in range(num_layers)])
        for layer in range(candidate.offer.start, candidate.offer.end):
            served[layer].add(candidate.operator)
    return any(all(len(those) >= per_layer for those in served) for served in operators.values())
