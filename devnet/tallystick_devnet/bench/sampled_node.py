"""A node that says where its time goes: `tallystick-node`, with every thread's place looked up 200 times a second.

SIGUSR1 writes the counts since the last time to `samples.json` beside the node's state.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from tallystick_node.cli import main as node_main

EVERY_S = 0.005
_IDLE = ("selectors.py", "threading.py", "queue.py", "futures/thread.py", "asyncio/runners.py")
_KINDS = (
    ("signing", ("/signing.py", "journal.py", "coincurve", "till.py", "database.py")),
    ("hashing", ("receipts.py", "record.py", "hashlib.py")),
    ("framing", ("frames.py", "peer.py", "channel.py", "uvicorn", "websockets", "aiohttp", "starlette", "msgpack")),
    ("model", ("tallystick_model", "torch", "transformers", "scheduling/engine.py", "rows.py", "ranking.py")),
)


def kind_of(frame: FrameType | None) -> str:
    """What a stack is at work on: the innermost frame that is known says it."""
    if frame is not None and any(part in frame.f_code.co_filename for part in _IDLE):
        return "waiting"
    while frame is not None:
        name = frame.f_code.co_filename
        for kind, parts in _KINDS:
            if any(part in name for part in parts):
                return kind
        frame = frame.f_back
    return "other"


class Sampler(threading.Thread):
    def __init__(self, path: Path) -> None:
        """path: where to write."""
        super().__init__(name="sampler", daemon=True)
        self._path = path
        self.counts: Counter[str] = Counter()

    def run(self) -> None:
        while True:
            time.sleep(EVERY_S)
            for ident, frame in sys._current_frames().items():
                if ident != self.ident:
                    self.counts[kind_of(frame)] += 1

    def write(self, *_: object) -> None:
        counts, self.counts = self.counts, Counter()
        self._path.with_suffix(".part").write_text(json.dumps(counts))
        self._path.with_suffix(".part").replace(self._path)


def main(arguments: Sequence[str]) -> int:
    state = Path(arguments[list(arguments).index("--state") + 1])
    sampler = Sampler(state.parent / "samples.json")
    sampler.start()
    signal.signal(signal.SIGUSR1, sampler.write)
    return node_main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
