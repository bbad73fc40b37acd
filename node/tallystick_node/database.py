"""One SQLite file per concern, written durably: what was committed survives SIGKILL and power loss."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tallystick_protocol.errors import ConfigError


class Database:
    """A SQLite file in WAL mode with an fsync per commit, safe to use from several threads."""

    def __init__(self, path: Path, schema: str, version: int) -> None:
        """Open or create. Raises ConfigError for a file that a newer version wrote, or that is no database."""
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            found = self._connection.execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.Error as error:
            raise ConfigError(f"{path} cannot be used as a database ({error}); move it away or restore it") from None
        if found not in (0, version):
            raise ConfigError(f"{path} has schema {found}, this program reads {version}: use the program that wrote it")
        self._lock = threading.RLock()
        self._connection.executescript(schema)
        self._connection.execute(f"PRAGMA user_version={version}")

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing; durable when the block has ended."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # a full disk may have rolled back already
                    self._connection.execute("ROLLBACK")
                raise

    def read(self, query: str, *values: object) -> list[tuple[object, ...]]:
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    def close(self) -> None:
        with self._lock:
            self._connection.close()
