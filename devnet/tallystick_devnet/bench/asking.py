"""Asking the network and looking at the clock: one answer, and several side by side."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tallystick.client import AsyncClient
from tallystick.generation import Answer, Token
from tallystick_devnet.bench.network import BenchNet


@dataclass(slots=True)
class Timed:
    """One answer, timed at the client. times: when each token came, in seconds since it was asked for.

    settled_s: when everything was signed for, checked and paid, an audit included where one was drawn.
    """

    answer: Answer
    times: list[float]
    settled_s: float

    @property
    def ids(self) -> list[int]:
        return self.answer.ids

    @property
    def first_s(self) -> float:
        """From the request to the first token, the opening included."""
        return self.times[0]

    @property
    def token_s(self) -> float:
        """Seconds a token, the first one's left out."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)

    @property
    def rate(self) -> float:
        """Tokens per second after the first."""
        return 1 / self.token_s

    @property
    def settled_rate(self) -> float:
        """The same, if the last one only counts when everything is settled."""
        return (len(self.times) - 1) / (self.settled_s - self.times[0])


async def timed(client: AsyncClient, net: BenchNet, prompt: list[int], tokens: int, **options: Any) -> Timed:
    """One generation; options as for `AsyncClient.stream`."""
    began = time.perf_counter()
    stream = client.stream(prompt, model=net.id, max_tokens=tokens, ignore_eos=True, **options)
    times = [time.perf_counter() - began async for event in stream if isinstance(event, Token)]
    return Timed(stream.answer, times, time.perf_counter() - began)


async def together(
    client: AsyncClient, net: BenchNet, prompts: Sequence[list[int]], tokens: int, **options: Any
) -> float:
    """Tokens per second of several generations side by side: `rate_together`."""
    began = time.perf_counter()

    async def one(prompt: list[int]) -> list[float]:
        stream = client.stream(prompt, model=net.id, max_tokens=tokens, ignore_eos=True, **options)
        return [time.perf_counter() - began async for event in stream if isinstance(event, Token)]

    return rate_together(await asyncio.gather(*(one(prompt) for prompt in prompts)))


def rate_together(streams: Sequence[Sequence[float]]) -> float:
    """Tokens per second while all streams run: from the last one's first token until one of them ends.

    Where they never all run at once, from the first token of all to the last.
    """
    begin, end = max(times[0] for times in streams), min(times[-1] for times in streams)
    if end <= begin:
        begin, end = min(times[0] for times in streams), max(times[-1] for times in streams)
    return sum(begin < at <= end for times in streams for at in times) / (end - begin)


def longest_stall(times: Sequence[float], since: float) -> float:
    """The longest wait for a token that did not end before `since`; what it took before that does not count."""
    return max((late - max(early, since) for early, late in pairwise(times) if late > since), default=0.0)
