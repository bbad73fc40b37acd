"""A node that says it is faster than any other and takes an eighth of a second for each forward.

Arguments as `tallystick-node`. What it computes is right.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from tallystick_node.cli import main
from tallystick_node.scheduling.engine import Engine
from tallystick_node.scheduling.load import Load

FORWARD_S = 0.12


class SlowEngine(Engine):
    """An engine that sleeps, and does not say so."""

    @property
    def load(self) -> Load:
        return Load(waiting_jobs=0, waiting_rows=0, step_s=1e-5, batch=1.0, rows_per_s=1e5, single_s=1e-5)

    def _compute(self, batch: Any) -> Any:
        time.sleep(FORWARD_S)
        return super()._compute(batch)


if __name__ == "__main__":
    sys.exit(main(make_engine=SlowEngine))
