"""Numeric classes that this machine measured before, kept on disk under everything that can change bits.

A kept class spares a start the class test; it counts as long as a running node's own measurement would. One file per
key, written in one step; a file that is damaged, another user's or about another key is measured anew. Processes that
want the same key at once wait for the one that measures.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from tallystick_model.devices import CPU
from tallystick_model.fingerprint import class_key, numeric_variables
from tallystick_model.numeric_class import STOCK, numeric_class
from tallystick_protocol.content.files import replacing
from tallystick_protocol.errors import ContentError
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.types import Digest

log = logging.getLogger(__name__)

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_MAX_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Measured:
    """A class. age_s: seconds since this machine measured it; infinite for one measured before its last boot."""

    numeric_class: Digest
    age_s: float


class KeptClasses:
    """Classes of this machine, by model and devices."""

    def __init__(
        self, folder: Path, environment: Mapping[str, str], measure: Callable[..., Digest] = numeric_class
    ) -> None:
        """folder: shared by all processes of one user. environment: the process's own variables."""
        self._folder = folder
        self._environment = numeric_variables(environment)
        self._measure = measure

    def find(self, manifest: Manifest, devices: Sequence[torch.device] = (CPU,)) -> Measured:
        """The kept class, else measured as `measure` does. Raises ManifestError."""
        path = self._path(manifest, devices)
        if (kept := _read(path)) is not None:
            return kept
        with _alone(path):
            if (kept := _read(path)) is not None:  # another process has measured it meanwhile
                return kept
            return Measured(self._measure_at(path, manifest, devices), 0.0)

    def measure(self, manifest: Manifest, devices: Sequence[torch.device] = (CPU,)) -> Digest:
        """The class as the machine computes at this moment; it takes the kept one's place. Raises ManifestError."""
        return self._measure_at(self._path(manifest, devices), manifest, devices)

    def _measure_at(self, path: Path, manifest: Manifest, devices: Sequence[torch.device]) -> Digest:
        found = self._measure(manifest, devices)
        try:
            if found == STOCK:  # never kept: what made the machine disagree with itself may pass
                path.unlink(missing_ok=True)
            else:
                _write(path, found)
        except (OSError, ContentError) as error:
            log.warning("the numeric class cannot be kept in %s (%s): every start measures it", path.parent, error)
        return found

    def _path(self, manifest: Manifest, devices: Sequence[torch.device]) -> Path:
        return self._folder / class_key(manifest, devices, self._environment)


def _read(path: Path) -> Measured | None:
    """What a file says; None unless it is whole, this user's, and about the key that it is named by."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_uid != os.getuid():
                return None
            value = json.loads(file.read(_MAX_BYTES))
        found, at, boot = bytes.fromhex(value["class"]), float(value["at"]), str(value["boot"])
        if value["sum"] != _sum(path.name, found, at, boot) or len(found) != len(STOCK) or found == STOCK:
            return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    age = time.time() - at
    return Measured(Digest(found), age if age >= 0 and boot == _boot() else float("inf"))


def _write(path: Path, found: Digest) -> None:
    at, boot = time.time(), _boot()
    value = {"class": found.hex(), "at": at, "boot": boot, "sum": _sum(path.name, found, at, boot)}
    with replacing(path) as out:
        out.write(json.dumps(value).encode())


def _sum(key: str, found: bytes, at: float, boot: str) -> str:
    return hashlib.sha256(repr((key, found, at, boot)).encode()).hexdigest()


def _boot() -> str:
    """Which boot of the machine this is; empty where the system does not say."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While held, no other process measures this key. Where the folder cannot be written, every process does."""
    handle = -1
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)  # empty until the class takes its place
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle >= 0:
            os.close(handle)
