"""The sign-once journal: a receipt is stored durably before its signature leaves, and never contradicted after.

Whatever is killed when, a restart finds the whole receipt and re-sends it; it never signs a second digest for the same
(session, attempt, window, revision).
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from tallystick_node.database import Database
from tallystick_protocol.errors import Equivocation
from tallystick_protocol.evidence.bundle import KEPT_S
from tallystick_protocol.receipts import Receipt
from tallystick_protocol.signing import Domain, Key, digest, seal, unseal
from tallystick_protocol.types import Digest, SessionId, window_of

log = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS receipts(
  session BLOB NOT NULL, attempt INTEGER NOT NULL, window INTEGER NOT NULL, revision INTEGER NOT NULL,
  digest BLOB NOT NULL, sealed BLOB NOT NULL, at INTEGER NOT NULL,
  PRIMARY KEY(session, attempt, window, revision)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sessions(session BLOB NOT NULL, attempt INTEGER NOT NULL, expires INTEGER NOT NULL,
  PRIMARY KEY(session, attempt)) WITHOUT ROWID;
"""

FORGOTTEN_AT_ONCE = 64
"""Sessions in one transaction: who signs meanwhile waits for no more."""


async def forget_now_and_then(journal: Journal, every_s: float = 86400.0) -> None:
    """Forget what is older than KEPT_S, at once and then daily."""
    while True:
        try:
            await asyncio.to_thread(journal.forget, int(time.time()) - KEPT_S)
        except sqlite3.Error as error:
            log.warning("old receipts stay in the journal for now: %s", error)
        await asyncio.sleep(every_s)


class Journal:
    """Signs receipts, once."""

    def __init__(self, path: Path, key: Key, domain: Domain) -> None:
        self._db = Database(path, _SCHEMA, version=1)
        self._path = path
        self._key = key
        self._domain = domain

    def admit(self, session: SessionId, attempt: int, expires: int, now: int) -> bool:
        """Remember a session until it expires; False when it was seen before, over restarts too."""
        with self._db.transaction() as db:
            db.execute("DELETE FROM sessions WHERE expires < ?", (now,))
            row = (session, attempt, expires)
            return db.execute("INSERT OR IGNORE INTO sessions VALUES(?,?,?)", row).rowcount == 1

    def sign(self, receipt: Receipt) -> bytes:
        """The sealed receipt, durably stored before it is returned.

        The same claim signed before is returned as it was, with its old time. Raises Equivocation for another claim.
        """
        key = (receipt.session, receipt.attempt, window_of(receipt.first), receipt.revision)
        with self._db.transaction() as db:
            query = "SELECT sealed FROM receipts WHERE session=? AND attempt=? AND window=? AND revision=?"
            found = db.execute(query, key).fetchone()
            if found is not None:
                return self._same_claim(receipt, bytes(found[0]))
            sealed = seal(self._domain, receipt, self._key)
            db.execute(
                "INSERT INTO receipts VALUES(?,?,?,?,?,?,?)",
                (*key, digest(self._domain, receipt), sealed, receipt.at),
            )
        return sealed

    def receipts(self, session: SessionId) -> list[bytes]:
        """Every sealed receipt of a session, in the order of windows and revisions."""
        query = "SELECT sealed FROM receipts WHERE session=? ORDER BY attempt, window, revision"
        return [bytes(row[0]) for row in self._db.read(query, session)]  # type: ignore[call-overload]

    def forget(self, before: int) -> int:
        """Forget the sessions whose last receipt is older than this time (unix seconds), and return how many receipts
        that were. None of them can be opened anew: what opens a session expires within hours."""
        old = "SELECT session FROM receipts GROUP BY session HAVING max(at) < ?"
        with closing(sqlite3.connect(self._path)) as reader:  # of its own: who signs does not wait for all that is read
            sessions, forgotten = reader.execute(old, (before,)).fetchall(), 0
        for first in range(0, len(sessions), FORGOTTEN_AT_ONCE):
            with self._db.transaction() as db:
                for (session,) in sessions[first : first + FORGOTTEN_AT_ONCE]:
                    query = "DELETE FROM receipts WHERE session=? AND NOT EXISTS"
                    query += " (SELECT 1 FROM receipts WHERE session=? AND at >= ?)"
                    forgotten += db.execute(query, (session, session, before)).rowcount
        return forgotten

    def digest_of(self, receipt: Receipt) -> Digest:
        return digest(self._domain, receipt)

    def close(self) -> None:
        self._db.close()

    def _same_claim(self, receipt: Receipt, sealed: bytes) -> bytes:
        before, _ = unseal(self._domain, Receipt, sealed)
        ours = {name: getattr(receipt, name) for name in Receipt.__slots__ if name != "at"}
        if any(getattr(before, name) != value for name, value in ours.items()):
            raise Equivocation("a different receipt was signed for this window and revision; nothing is signed")
        return sealed
