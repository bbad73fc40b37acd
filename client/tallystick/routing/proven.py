"""Numeric classes that count for one client: two operators of each have computed the same bits, in its own audits.

What class a node is of it says itself, and how much of what it computes the class test has covered nobody knows. Until
two owners that have nobody in common were seen to agree bit for bit, a difference of bits says nothing of either.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tallystick.routing.remembered import latest, newer, read, write
from tallystick_protocol.types import Address, Digest

VERSION = 1
MAX_CLASSES = 1_000
FORGOTTEN_AFTER_S = 30 * 86_400.0
"""After the last agreement: it costs one audit to see it again."""


@dataclass(frozen=True, slots=True)
class Record:
    """owners: of the two that agreed last, one of each. at: unix seconds of that."""

    owners: tuple[Address, Address]
    at: float


class Proven:
    """What is remembered of classes, kept in a file if one is given."""

    def __init__(self, path: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        """path: read if it is there; what cannot be read is started anew."""
        self._path, self._clock = path, clock
        self._records = _read(path)

    def __len__(self) -> int:
        return len(self._records)

    def note(self, numeric_class: bytes, one: Collection[Address], other: Collection[Address]) -> None:
        """Two nodes of a class have signed the same output for the same rows. one, other: their operators and payees,
        or the client's own address; who has an owner in common with the other is one voice, not two."""
        if not any(numeric_class) or not one or not other or set(one) & set(other):
            return
        self._records[Digest(numeric_class)] = Record((min(one), min(other)), self._clock())
        self._records = latest(self._records, MAX_CLASSES)

    def counts(self, numeric_class: bytes) -> bool:
        """Whether two operators of this class have agreed bit for bit. Never so for nodes of no class."""
        record = self._records.get(Digest(numeric_class))
        return record is not None and not self._is_old(record)

    def save(self) -> None:
        """Write the file, with what other processes have seen meanwhile. Blocking."""
        if self._path is None:
            return
        self._records = latest(newer(self._records, _read(self._path)), MAX_CLASSES)
        kept = {
            numeric_class.hex(): {"owners": list(record.owners), "at": record.at}
            for numeric_class, record in self._records.items()
            if not self._is_old(record)
        }
        write(self._path, VERSION, {"classes": kept}, "numeric classes")

    def _is_old(self, record: Record) -> bool:
        return self._clock() - record.at > FORGOTTEN_AFTER_S


def _read(path: Path | None) -> dict[Digest, Record]:
    nothing: dict[Digest, Record] = {}
    return read(path, VERSION, _from_json, nothing, "numeric classes")


def _from_json(body: Any) -> dict[Digest, Record]:
    return {Digest(bytes.fromhex(key)): _record(value) for key, value in body["classes"].items()}


def _record(value: Any) -> Record:
    one, other = (Address(str(owner)) for owner in value["owners"])
    at = float(value["at"])
    if one == other or not 0 <= at < float("inf"):
        raise ValueError("one owner is not two")
    return Record((one, other), at)
