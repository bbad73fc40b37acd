"""A node that cheats: after its canary has passed, one row of one weight gets 1 % of noise.

Arguments as `tallystick-node`.

Its pieces, its class and its signatures are all in order; only the numbers that it computes are wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults.computing import corrupt_row
from tallystick_model.span import SpanModel
from tallystick_node.cli import main
from tallystick_node.scheduling.engine import Engine


class NoisyEngine(Engine):
    """An engine over a span whose first linear layer has one wrong row."""

    def __init__(self, model: SpanModel, step_rows: int) -> None:
        corrupt_row(model)
        print("fault: row 0 of a weight is wrong", flush=True)
        super().__init__(model, step_rows)


if __name__ == "__main__":
    sys.exit(main(make_engine=NoisyEngine))
