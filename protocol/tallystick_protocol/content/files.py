"""Writing files so that a crash, a full disk or a second process leaves the old file or the new one, nothing else."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from tallystick_protocol.errors import ContentError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(path: Path, scratch: Path | None = None) -> Iterator[IO[bytes]]:
    """A new file that takes `path`'s place when the block ends well, and vanishes when it does not.

    scratch: the folder it grows in, on the same file system; `path`'s own by default.
    Raises ContentError when the disk is full.
    """
    with disk_errors(path):
        folder = scratch or path.parent
        folder.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=".new-")
    try:
        with disk_errors(path):
            with os.fdopen(handle, "wb") as out:
                os.fchmod(handle, 0o644)
                yield out
                out.flush()
                os.fsync(out.fileno())
            os.replace(name, path)
            sync_folder(path.parent)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk into a ContentError that says where room is needed."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ContentError(f"no space left to write {path}: free some, then run the same command again") from error
        raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path, *, shared: bool, timeout_s: float) -> Iterator[None]:
    """Hold an advisory lock over processes and threads alike. Raises ContentError when it is not had in time."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise ContentError(f"{path} stayed locked by another process for {timeout_s:g} s") from None
                time.sleep(0.02)
        yield
    finally:
        os.close(handle)
