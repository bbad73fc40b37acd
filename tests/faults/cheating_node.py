"""A node that cheats: first argument how (a name of `computing` or `breaking`), the others as `tallystick-node`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults.breaking import BREAKING, bending
from faults.computing import COMPUTING, answers_unchecked
from tallystick_model.span import SpanModel
from tallystick_node.cli import main
from tallystick_node.scheduling.engine import Engine


def run(name: str) -> int:
    """The true node software, with one thing altered. A node that computes wrongly serves whole spans only."""
    if name in BREAKING:
        print(f"fault: {name}", flush=True)
        with bending(lambda _: BREAKING[name].bend):
            return main()

    class Cheating(Engine):
        def __init__(self, model: SpanModel, step_rows: int) -> None:
            COMPUTING[name](model)
            super().__init__(model, step_rows)
            self.serves_parts = False
            print(f"fault: {name}", flush=True)

    with answers_unchecked():
        return main(make_engine=Cheating)


if __name__ == "__main__":
    sys.exit(run(sys.argv.pop(1)))
