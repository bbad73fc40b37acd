"""What a client remembers from one run to the next: JSON files that several of its processes may read and write."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

log = logging.getLogger(__name__)


class Dated(Protocol):
    """at: unix seconds of what was learned last."""

    @property
    def at(self) -> float: ...


K = TypeVar("K")
D = TypeVar("D", bound=Dated)
T = TypeVar("T")


def read(path: Path | None, version: int, parse: Callable[[Any], T], nothing: T, of: str) -> T:
    """What `parse` makes of a file; nothing where it is missing, of another version, or not ours."""
    try:
        if path is None or not path.exists():
            return nothing
        body = json.loads(path.read_text())
        return parse(body) if body["version"] == version else nothing
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        log.warning("%s is not what this client wrote: what is known of %s starts anew", path, of)
        return nothing


def write(path: Path, version: int, body: Mapping[str, Any], of: str) -> None:
    """Replace the file in one step; one that cannot be written is told of, and no error. Blocking."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps({"version": version, **body}))
        draft.replace(path)
    except OSError as error:
        log.warning("what was learned of %s is not kept: %s cannot be written (%s)", of, path, error.strerror)


def newer(ours: Mapping[K, D], theirs: Mapping[K, D]) -> dict[K, D]:
    """Of both, the later one of each."""
    return {**ours, **{key: one for key, one in theirs.items() if key not in ours or one.at > ours[key].at}}


def latest(records: dict[K, D], most: int) -> dict[K, D]:
    """The records as they are, or, where there are more than `most`, nine tenths of that: the latest ones."""
    if len(records) <= most:
        return records
    return dict(sorted(records.items(), key=lambda item: -item[1].at)[: most * 9 // 10])
