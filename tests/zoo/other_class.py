"""A node of another numeric class: this program in a process whose libraries are held to AVX2 (docs/numerics.md).

One line of JSON in, one out: rows that enter a span, rows that leave it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tallystick_devnet.localchain import repository
from tallystick_model.calibrating.machines import AVX2
from tallystick_protocol.manifest import Numerics
from tallystick_protocol.sketching.logits import scales_of
from tallystick_protocol.types import Span
from zoo.audits import AtNode, Task
from zoo.models import demo


@dataclass(frozen=True, slots=True)
class Answer:
    """outputs: a row for each position. scales: (n,) of the results' rows, 1 where none was wanted."""

    outputs: list[bytes]
    scales: Any


def compute(numerics: Numerics, span: Span, tasks: Sequence[Task]) -> list[Answer]:
    """Each session in one prefill."""
    model, answers = demo(numerics).load(span), []
    for number, task in enumerate(tasks):
        session = AtNode(model, f"other {number}", len(task))
        result = model.forward([session.segment(task.rows, task.want)])[0]
        scales = np.ones(len(task))
        if model.is_last:
            scales[np.flatnonzero(task.want)] = scales_of(result.numpy(), is_ranking=True)
        answers.append(Answer(session.format.outputs(result, task.want), scales))
    return answers


class OtherClass:
    """The side that asks; a context manager."""

    def __enter__(self) -> OtherClass:
        path = os.pathsep.join(part for part in (str(repository() / "tests"), os.environ.get("PYTHONPATH")) if part)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "zoo.other_class"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **AVX2.environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def compute(self, numerics: Numerics, span: Span, tasks: Sequence[Task]) -> list[Answer]:
        """As `compute` says, over there."""
        asked = {
            "numerics": numerics,
            "span": [span.start, span.end],
            "tasks": [[[row.hex() for row in task.rows], task.want, task.prompt] for task in tasks],
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        told = json.loads(self._process.stdout.readline())
        return [Answer([bytes.fromhex(row) for row in rows], np.array(scales)) for rows, scales in told]


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        asked = json.loads(line)
        tasks = [Task([bytes.fromhex(row) for row in rows], want, prompt) for rows, want, prompt in asked["tasks"]]
        answers = compute(asked["numerics"], Span(*asked["span"]), tasks)
        told = [[[row.hex() for row in one.outputs], one.scales.tolist()] for one in answers]
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
