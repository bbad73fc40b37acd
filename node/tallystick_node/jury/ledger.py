"""What a juror must not forget, written durably before what depends on it leaves: cases, findings, ballots, appeals.

A ballot is made once for a case and round, with its vote and its salt, before its commitment is sent. Whatever is
killed when, a restart sends that very commitment again, or reveals that very vote; it never makes another.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tallystick_node.database import Database
from tallystick_node.jury.judging import Finding
from tallystick_protocol.chain.court import Vote, commitment
from tallystick_protocol.chain.docket import Opening
from tallystick_protocol.types import Address, Digest, Wei

_SCHEMA = """
CREATE TABLE IF NOT EXISTS seen(one INTEGER PRIMARY KEY CHECK(one = 1), block INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS cases(
  id BLOB PRIMARY KEY, accused TEXT NOT NULL, accuser TEXT NOT NULL, receipt BLOB NOT NULL, evidence BLOB NOT NULL,
  bond TEXT NOT NULL, block INTEGER NOT NULL, trx BLOB NOT NULL, done INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS findings(id BLOB PRIMARY KEY, finding TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ballots(
  id BLOB NOT NULL, round INTEGER NOT NULL, seats TEXT NOT NULL, vote INTEGER NOT NULL, roots BLOB NOT NULL,
  salt BLOB NOT NULL, PRIMARY KEY(id, round)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS appeals(
  id BLOB NOT NULL, round INTEGER NOT NULL, bond TEXT NOT NULL, others INTEGER NOT NULL,
  lost INTEGER NOT NULL DEFAULT 0, PRIMARY KEY(id, round)) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Sworn:
    """A ballot as it was made. roots: what the juror computed, zero where it did not; salt: 32 random bytes."""

    round: int
    seats: tuple[int, ...]
    vote: Vote
    roots: Digest
    salt: bytes

    def commitment(self, case: Digest, juror: Address) -> Digest:
        return commitment(case, self.round, juror, self.vote, self.roots, self.salt)


class Ledger:
    """One juror's book."""

    def __init__(self, path: Path) -> None:
        self._db = Database(path, _SCHEMA, version=1)

    @property
    def seen(self) -> int:
        """The last block whose cases are all in the book, and will stay; -1 for none."""
        rows = self._db.read("SELECT block FROM seen")
        return int(str(rows[0][0])) if rows else -1

    def note(self, openings: Sequence[Opening], seen: int) -> None:
        """Enter cases, and that all of those up to a block are entered. Again is the same as once."""
        with self._db.transaction() as db:
            for one in openings:
                row = (one.id, one.accused, one.accuser, one.receipt, one.evidence, str(one.bond), one.block)
                db.execute("INSERT OR IGNORE INTO cases VALUES(?,?,?,?,?,?,?,?,0)", (*row, one.transaction))
                # After a reorganisation a case may stand in another block and transaction.
                moved = (one.block, one.transaction, one.id)
                db.execute("UPDATE cases SET block = ?, trx = ?, done = 0 WHERE id = ? AND trx <> ?",
                           (*moved, one.transaction))  # fmt: skip
            db.execute("INSERT INTO seen VALUES(1, ?) ON CONFLICT(one) DO UPDATE SET block = excluded.block", (seen,))

    def open_cases(self) -> list[Opening]:
        """Those that are not done with, oldest first."""
        columns = "id, accused, accuser, receipt, evidence, bond, block, trx"
        return [
            Opening(
                Digest(_blob(id_)), Address(str(accused)), Address(str(accuser)), Digest(_blob(receipt)),
                Digest(_blob(evidence)), Wei(int(str(bond))), int(str(block)), _blob(trx),
            )
            for id_, accused, accuser, receipt, evidence, bond, block, trx in self._db.read(
                f"SELECT {columns} FROM cases WHERE done = 0 ORDER BY block"
            )
        ]  # fmt: skip

    def close_case(self, case: Digest) -> None:
        with self._db.transaction() as db:
            db.execute("UPDATE cases SET done = 1 WHERE id = ?", (case,))

    def finding(self, case: Digest) -> Finding | None:
        rows = self._db.read("SELECT finding FROM findings WHERE id = ?", case)
        return Finding.from_json(str(rows[0][0])) if rows else None

    def find(self, case: Digest, finding: Finding) -> None:
        """What was found, once and for all rounds: the evidence is the same."""
        with self._db.transaction() as db:
            db.execute("INSERT OR IGNORE INTO findings VALUES(?,?)", (case, finding.to_json()))

    def ballot(self, case: Digest, round_: int) -> Sworn | None:
        rows = self._db.read("SELECT seats, vote, roots, salt FROM ballots WHERE id = ? AND round = ?", case, round_)
        if not rows:
            return None
        seats, vote, roots, salt = rows[0]
        return Sworn(round_, tuple(json.loads(str(seats))), Vote(int(str(vote))), Digest(_blob(roots)), _blob(salt))

    def swear(self, case: Digest, round_: int, seats: Sequence[int], vote: Vote, roots: Digest) -> Sworn:
        """The ballot of a round: the one that was made before, or this one with a fresh salt, durable on return."""
        with self._db.transaction() as db:
            row = (case, round_, json.dumps(list(seats)), int(vote), roots, secrets.token_bytes(32))
            db.execute("INSERT OR IGNORE INTO ballots VALUES(?,?,?,?,?,?)", row)
        sworn = self.ballot(case, round_)
        assert sworn is not None
        return sworn

    def rounds(self, case: Digest) -> list[int]:
        """The rounds for which there is a ballot."""
        return [
            int(str(row[0])) for row in self._db.read("SELECT round FROM ballots WHERE id = ? ORDER BY round", case)
        ]

    def pledge(self, case: Digest, round_: int, bond: Wei, others: bool, budget: Wei) -> bool:
        """Enter the bond of an appeal, durable on return; False, and nothing, if it would exceed the budget.

        others: whether the case is one of others, whose appeals have a budget of their own. Counted are those that
        are open and those that were lost. Again is the same as once.
        """
        with self._db.transaction() as db:
            rows = db.execute("SELECT id, round, bond FROM appeals WHERE others = ?", (others,)).fetchall()
            if any((id_, at) == (case, round_) for id_, at, _ in rows):
                return True
            if sum(int(str(row[2])) for row in rows) + bond > budget:
                return False
            db.execute("INSERT INTO appeals VALUES(?,?,?,?,0)", (case, round_, str(bond), others))
        return True

    def pledges(self, case: Digest) -> list[int]:
        """The rounds of a case whose appeals are open."""
        rows = self._db.read("SELECT round FROM appeals WHERE id = ? AND lost = 0 ORDER BY round", case)
        return [int(str(row[0])) for row in rows]

    def end_pledge(self, case: Digest, round_: int, is_lost: bool) -> None:
        """A lost bond counts from then on; one that came back, or was never paid, is forgotten."""
        change = "UPDATE appeals SET lost = 1" if is_lost else "DELETE FROM appeals"
        with self._db.transaction() as db:
            db.execute(f"{change} WHERE id = ? AND round = ?", (case, round_))

    def close(self) -> None:
        self._db.close()


def _blob(value: object) -> bytes:
    assert isinstance(value, bytes)
    return value
