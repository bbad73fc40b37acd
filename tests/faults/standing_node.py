"""A node whose device stands still from SIGUSR1 to SIGUSR2, while everything else of it goes on and answers.

Arguments as `tallystick-node`.
"""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

from tallystick_node.cli import main
from tallystick_node.scheduling.engine import Engine

goes = threading.Event()


class StandingEngine(Engine):
    """Begins no forward while it is told to stand."""

    def _compute(self, batch: Any) -> Any:
        if not goes.is_set():
            print("fault: the device stands", flush=True)
            goes.wait()
        return super()._compute(batch)


if __name__ == "__main__":
    goes.set()
    signal.signal(signal.SIGUSR1, lambda *_: goes.clear())
    signal.signal(signal.SIGUSR2, lambda *_: goes.set())
    sys.exit(main(make_engine=StandingEngine))
