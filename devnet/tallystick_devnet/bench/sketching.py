"""What hashes and sketches cost, in microseconds of CPU time: `python -m tallystick_devnet.bench.sketching`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import numpy as np

from tallystick_protocol.receipts import leaf
from tallystick_protocol.sketching.matrix import matrix
from tallystick_protocol.sketching.rows import ROW_BYTES, Sketches, sketch
from tallystick_protocol.sketching.statistic import error
from tallystick_protocol.types import WINDOW, Positions

CHALLENGE = bytes(range(32))


def measure(width: int) -> dict[str, float]:
    """Microseconds per position, of whole windows: hashes of what enters and leaves, sketches, their root, and, at the
    client, parsing and comparing two answers."""
    numbers = np.random.default_rng(0)
    x = (15 * numbers.standard_normal((WINDOW, width))).astype(np.float32)
    y = (x + numbers.standard_normal((WINDOW, width))).astype(np.float32)
    at = Positions(0, WINDOW)
    made, rows = sketch(CHALLENGE, at, x, y), [row.tobytes() for row in x]

    def compare() -> float:
        return error(Sketches.from_bytes(CHALLENGE, at, made.to_bytes()), made)

    parts: dict[str, Callable[[], object]] = {
        "hashes": lambda: [leaf(row) for row in rows + rows],
        "matrix": lambda: matrix(CHALLENGE, width),
        "matrix and sketches": lambda: sketch(CHALLENGE, at, x, y),
        "root": lambda: made.root,
        "client": compare,
    }
    return {name: 1e6 * _seconds(work) / WINDOW for name, work in parts.items()}


def _seconds(work: Callable[[], object], least_s: float = 0.2) -> float:
    """CPU time of one call: the least of five averages."""
    work()
    found = []
    for _ in range(5):
        count, began = 0, time.process_time()
        while (took := time.process_time() - began) < least_s / 5:
            work()
            count += 1
        found.append(took / count)
    return min(found)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, action="append", help="of a row; more than once")
    widths = parser.parse_args(arguments).width or [576, 2048, 4096]
    print(f"{ROW_BYTES} bytes a position and hop; microseconds of CPU time a position")
    for width in widths:
        found = ", ".join(f"{name} {cost:.2f}" for name, cost in measure(width).items())
        print(f"width {width} ({4 * width} bytes a row): {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
