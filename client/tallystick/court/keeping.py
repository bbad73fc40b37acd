"""Evidence that is kept: pinned in a content store that somebody serves, within a budget, while a stake answers for it.

Beside the store's own folders `evidence/` holds a note for each bundle: the receipt's time and the bundle's bytes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from tallystick_protocol.content.cid import Cid
from tallystick_protocol.content.files import replacing
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.errors import BadCid, BlockMissing, ConfigError, ContentError
from tallystick_protocol.evidence.bundle import KEPT_S, Bundle

log = logging.getLogger(__name__)

KEPT_BYTES = 1 << 30


def keep_evidence(store: LocalStore, data: bytes, most_bytes: int = KEPT_BYTES) -> Cid:
    """Keep a bundle, pinned, so that whoever serves the store serves it; what is too old goes first.

    Raises BadEvidence, and ConfigError where it and what is still kept are more than `most_bytes`.
    """
    accused = Bundle.decode(data).accused
    prune(store)
    with_it = len(data) + sum(size for _, _, size in _notes(store))
    cid = store.put_file(BytesIO(data))
    if _note(store, cid).exists():
        return cid
    if with_it > most_bytes:
        if cid not in store.pins():
            store.drop(cid)
        raise ConfigError(f"evidence in {store.root} would take {with_it} bytes, {most_bytes} may be kept")
    store.pin(cid)
    with replacing(_note(store, cid)) as out:
        out.write(f"{accused.at} {len(data)}".encode())
    return cid


def prune(store: LocalStore, now: float | None = None) -> list[Cid]:
    """Drop the bundles whose receipts nobody can be slashed for any more, and return which those were."""
    now, gone = time.time() if now is None else now, []
    for cid, at, _ in list(_notes(store)):
        if now < at + KEPT_S:
            continue
        try:
            store.drop(cid)
        except BlockMissing:
            store.unpin(cid)
        except ContentError as error:
            log.info("evidence %s stays for now: %s", cid, error.message)
            continue
        _note(store, cid).unlink(missing_ok=True)
        gone.append(cid)
    return gone


def _note(store: LocalStore, cid: Cid) -> Path:
    return store.root / "evidence" / str(cid)


def _notes(store: LocalStore) -> Iterator[tuple[Cid, int, int]]:
    """(bundle, its receipt's time, bytes) of all that is kept."""
    for path in sorted((store.root / "evidence").glob("*")):
        try:
            at, size = path.read_text().split()
            yield Cid.parse(path.name), int(at), int(size)
        except (BadCid, ValueError, FileNotFoundError):
            continue
