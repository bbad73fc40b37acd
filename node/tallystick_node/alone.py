"""Work with tensors beside the device thread.

libgomp lets the threads that wait for the next product spin only while there are no more of them in the process than
cores, and a thread that has computed once keeps its helpers: so whoever computes does it in a thread that ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


async def alone(function: Callable[..., T], *arguments: Any) -> T:
    """function(*arguments), in a thread of its own; torch's helpers of that thread end with it."""
    executor = ThreadPoolExecutor(1, "alone")
    try:
        return await asyncio.get_running_loop().run_in_executor(executor, function, *arguments)
    finally:
        executor.shutdown(wait=False)
