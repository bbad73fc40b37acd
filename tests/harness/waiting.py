"""Waiting for something with a deadline, and saying what was waited for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


async def eventually(what: str, done: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Poll until `done`; raises AssertionError naming what never came."""
    deadline = time.monotonic() + timeout_s
    while not await asyncio.to_thread(done):
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        await asyncio.sleep(0.05)
