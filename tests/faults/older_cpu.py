"""A node whose libraries are told that the CPU is an older one: of another numeric class.

`older_cpu.py NAME=VALUE,… COMMAND.py|MODULE arguments…`: sets the variables, which the libraries read when they are
loaded, and becomes that command.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    given = dict(pair.split("=") for pair in sys.argv[1].split(","))
    command = [sys.argv[2]] if sys.argv[2].endswith(".py") else ["-m", sys.argv[2]]
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *command, *sys.argv[3:]], {**os.environ, **given})


if __name__ == "__main__":
    main()
