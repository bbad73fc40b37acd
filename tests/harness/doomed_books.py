"""Processes that sign receipts and take vouchers until they are killed by SIGKILL: at their n-th SQL statement by
themselves, or before the n-th system call that writes, syncs or sends by whoever forked them.

argv: folder, "statements" or "calls". For each n read from stdin a process is forked; when it is dead, "dead STATUS
WHERE" is printed. It says "receipt REVISION DIGEST-HEX" or "voucher TOTAL" after each call has returned, which is when
the outside world may have seen it. The content of a receipt differs from run to
run: the same key is tried with another claim.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Any

from harness import samples
from harness.killing import kill_before
from tallystick_node.journal import Journal
from tallystick_node.till import Funds, Till
from tallystick_protocol.errors import Equivocation
from tallystick_protocol.signing import keccak, seal
from tallystick_protocol.types import SessionId, Wei
from tallystick_protocol.vouchers import Voucher

HOT, CLIENT = samples.key("hot"), samples.key("client")
ENOUGH = Funds(Wei(10**9), Wei(10**9), Wei(0))
STEP = 7
COST = 3


def open_till(folder: Path) -> Till:
    path, credit = folder / "till.db", Wei(10**6)
    return Till(path, HOT.address, samples.ESCROW, credit, Wei(0), lambda client, signer: client == signer)


def open_journal(folder: Path) -> Journal:
    return Journal(folder / "journal.db", HOT, samples.STAKING)


def main(folder: Path, fatal: int) -> None:
    executed = 0

    def count(_: str) -> None:
        nonlocal executed
        executed += 1
        if executed == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    connect = sqlite3.connect

    def traced(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*arguments, **options)
        connection.set_trace_callback(count)
        return connection

    sqlite3.connect = traced  # type: ignore[assignment]
    journal, till = open_journal(folder), open_till(folder)
    while True:
        total = till.account(CLIENT.address).signed + STEP
        till.charge(CLIENT.address, Wei(COST))
        till.settle(CLIENT.address, 0)
        voucher = seal(samples.ESCROW, Voucher(CLIENT.address, HOT.address, total), CLIENT)
        till.accept(voucher, CLIENT.address, ENOUGH, 0)
        say(f"voucher {total}")
        revision = next_revision(journal)
        for attempt in (revision - 1, revision):
            if attempt < 0:
                continue
            claim = samples.receipt(revision=attempt, output=keccak(os.urandom(8)))
            try:
                say(f"receipt {attempt} {keccak(journal.sign(claim)).hex()}")
            except Equivocation:
                continue


def say(line: str) -> None:
    """Send it in one call: it has left, or nothing of it has."""
    os.write(1, f"{line}\n".encode())


def fork(folder: Path, kind: str, fatal: int) -> tuple[int, str]:
    """The wait status of a process that ran `main`, and the call before which it was killed."""
    if kind == "calls":
        return kill_before(fatal, lambda: main(folder, 0))
    child = os.fork()
    if child == 0:
        try:
            main(folder, fatal)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1], "statement"


def next_revision(journal: Journal) -> int:
    return len(journal.receipts(SessionId(samples.receipt().session)))


if __name__ == "__main__":
    for line in sys.stdin:
        print("dead", *fork(Path(sys.argv[1]), sys.argv[2], int(line)), flush=True)
