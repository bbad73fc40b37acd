"""A node that accounts for its time when it is asked to: `tallystick-node` otherwise.

SIGUSR1 begins an account; the next one ends it, written to `account.json` beside the node's state.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tallystick_devnet.bench.accounts import Account, Sampler, counted
from tallystick_node.cli import main as node_main


class Accountant:
    """Nothing is looked at, nor counted, but between two calls of `turn`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._going_on: Sampler | None = None
        self._counting = ExitStack()
        self._counts: dict[str, int] = {}

    def turn(self, *_: object) -> None:
        """Begin, or end and write."""
        if self._going_on is None:
            self._counts = self._counting.enter_context(counted())
            self._going_on = Sampler()
            self._going_on.start()
            self._write(Account())
        else:
            account = self._going_on.end()
            self._counting.close()
            account.counts = self._counts
            self._going_on = None
            self._write(account)

    def _write(self, account: Account) -> None:
        part = self._path.with_suffix(".part")
        part.write_text(account.to_json())
        part.replace(self._path)


def main(arguments: Sequence[str]) -> int:
    state = Path(arguments[list(arguments).index("--state") + 1])
    signal.signal(signal.SIGUSR1, Accountant(state.parent / "account.json").turn)
    return node_main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
