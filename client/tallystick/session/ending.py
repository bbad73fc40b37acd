"""Tasks of a session, when they are needed no more."""

from __future__ import annotations

import asyncio
from typing import Any


async def end(task: asyncio.Task[Any] | None) -> None:
    """Cancel a task, if there is one, and wait until it is gone, whatever it ends with."""
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
