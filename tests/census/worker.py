"""A process that examines one type after another: a name per line in, a JSON object per line out."""

from __future__ import annotations

import json
import sys

import torch

from census.configs import entries
from census.exam import examine


def main() -> None:
    torch.set_num_threads(1)
    known = {entry.name: entry for entry in entries()}
    answers = sys.stdout
    sys.stdout = sys.stderr  # what models print must not come between the answers
    for line in sys.stdin:
        answers.write(json.dumps(examine(known[line.strip()])) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
