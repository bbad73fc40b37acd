"""Work with tensors beside the device thread.

libgomp lets the threads that wait for the next product spin only while there are no more of them in the process than
cores, and a thread that has computed once keeps its helpers: so whoever computes does it in a thread that ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

T = TypeVar("T")


async def alone(function: Callable[..., T], *arguments: Any, threads: int = 1) -> T:
    """function(*arguments), in a thread of its own that computes with so many of torch's, which end with it."""

    def run() -> T:
        set_threads(threads)
        return function(*arguments)

    executor = ThreadPoolExecutor(1, "alone")
    try:
        return await asyncio.get_running_loop().run_in_executor(executor, run)
    finally:
        executor.shutdown(wait=False)


def set_threads(count: int) -> None:
    """How many threads the calling one computes with. What others set later does not change it: torch gives a thread
    the process's number when it looks at it first."""
    torch.set_num_threads(count)
    torch.get_num_threads()
