"""What nodes still hold when nobody uses them: sessions, bytes of caches, open files and tasks."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass

from tallystick_devnet.localnet import LocalNode

POLL_S = 0.25
SPARE = 4
"""Files and tasks that may be more than when the node had just begun: connections kept alive for a moment."""


@dataclass(frozen=True, slots=True)
class Holdings:
    """What one process holds."""

    sessions: int
    reserved_bytes: int
    files: int
    tasks: int

    def beyond(self, before: Holdings) -> list[str]:
        """What it should not hold, in words. before: when it had just begun."""
        return [
            *([f"{self.sessions} sessions"] if self.sessions else []),
            *([f"{self.reserved_bytes} bytes of caches"] if self.reserved_bytes else []),
            *([f"{self.files} open files, {before.files} at first"] if self.files > before.files + SPARE else []),
            *([f"{self.tasks} tasks, {before.tasks} at first"] if self.tasks > before.tasks + SPARE else []),
        ]


def holdings(node: LocalNode, port: int) -> Holdings:
    """port: the node's own, without a proxy. Raises OSError when it does not answer."""
    status = json.loads(_get(port, "/v1/info"))["status"]
    metrics = dict(line.split() for line in _get(port, "/metrics").splitlines() if line and line[0] != "#")
    files = len(os.listdir(f"/proc/{node.process.pid}/fd"))
    return Holdings(
        status["sessions"], status["reserved_bytes"], files, int(float(metrics["tallystick_asyncio_tasks"]))
    )


def leaks(nodes: Sequence[tuple[LocalNode, int, Holdings]], timeout_s: float) -> list[str]:
    """What nodes hold too much, once they have had some time to let go. nodes: with port and first holdings."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = [f"{node.name}: {what}" for node, port, before in nodes for what in holdings(node, port).beyond(before)]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(POLL_S)


def _get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
        data: bytes = response.read()
    return data.decode()
