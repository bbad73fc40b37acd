"""Fetch a model, have it measured between numeric classes, and make a manifest that says what was found."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tallystick.inspection import Desk
from tallystick.publishing import contents
from tallystick.tokens import Tokens
from tallystick_protocol.content.cid import Cid, Codec
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.errors import ConfigError, TallystickError
from tallystick_protocol.manifest import MAX_BYTES, Manifest

SHORTEST = 64


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to measure. lengths: of the spans. text: a file, or None for what the model itself writes.

    devices: torch devices that show further classes.
    """

    lengths: Sequence[int]
    texts: int
    positions: int
    text: Path | None = None
    seed: int = 0
    devices: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Calibration:
    """manifest: with margins. classes: by name. head, table: for people; values: for programs; plot: an SVG."""

    manifest: Manifest
    classes: list[str]
    head: Sequence[str]
    table: list[tuple[str, ...]]
    values: list[dict[str, Any]]
    plot: str


async def calibrate(
    text: str,
    store: LocalStore,
    sources: Sequence[str],
    wanted: Wanted,
    environment: Mapping[str, str],
    say: Callable[[str], None],
) -> Calibration:
    """Measure a model and put a manifest with what was found into the store; needs the extra `[torch]`.

    text: the CID of its manifest. environment: of the processes that compute. Raises ConfigError without the extra, for
    a machine of one class, and where thresholds would have to be loosened; what fetching raises.
    """
    try:
        from tallystick_model.calibrating.judging import calibrated, judge
        from tallystick_model.calibrating.measuring import Plan, measure, spans_of
        from tallystick_model.calibrating.report import HEAD, plot, rows, values
    except ImportError:
        raise ConfigError("calibrating takes torch: pip install 'tallystick[torch]'") from None
    try:
        cid = Cid.parse(text)
    except TallystickError as error:
        raise ConfigError(f"{text[:80]!r} is not the CID of a manifest ({error.message})") from None
    with tempfile.TemporaryDirectory(prefix="tallystick-calibrate-") as folder:
        desk = Desk(store, sources, Path(folder))
        manifest = Manifest.from_bytes((await desk.file(cid, MAX_BYTES)).read_bytes())
        spans = spans_of(manifest, wanted.lengths)
        positions = min(wanted.positions, manifest.max_length)
        if positions < SHORTEST:
            raise ConfigError(f"texts of {positions} positions are too short: take {SHORTEST} or more")
        ids = None if wanted.text is None else await _ids(desk, manifest, wanted, positions)
        for piece in manifest.pieces:
            await desk.file(piece.cid, piece.bytes)
        say(f"{manifest.name}: {len(spans)} spans, {wanted.texts} texts of {positions} positions")
        plan = Plan(manifest, Path(folder), spans, ids, wanted.texts, positions, wanted.seed, wanted.devices)
        classes, measured = measure(plan, environment, say)
    judged = [judge(one, wanted.seed) for one in measured]
    made = calibrated(manifest, judged)
    keep(store, manifest, made)
    names = [kind.name for kind in classes]
    return Calibration(made, names, HEAD, rows(judged), values(judged), plot(manifest, judged))


def keep(store: LocalStore, before: Manifest, made: Manifest) -> None:
    """Put a manifest beside the one that it differs from; what both name is pinned where it is in the store."""
    block = made.to_bytes()
    Manifest.from_bytes(block)
    store.put_block(block, Codec.RAW)
    for cid in contents(made):
        if store.has(cid):
            store.pin(cid)


async def _ids(desk: Desk, manifest: Manifest, wanted: Wanted, positions: int) -> Any:
    """(texts, positions) int64, from all over the text. Raises ConfigError for one that is too short."""
    assert wanted.text is not None
    reference = manifest.tokenizer.get("tokenizer.json")
    if reference is None:
        raise ConfigError(f"{manifest.name} has no tokenizer: leave out --text")
    try:
        text = wanted.text.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{wanted.text} cannot be read as text ({type(error).__name__})") from None
    ids = Tokens(await desk.file(reference.cid, reference.bytes)).encode(text)
    if len(ids) < wanted.texts * positions:
        raise ConfigError(f"{wanted.text} has {len(ids)} tokens, {wanted.texts} texts of {positions} take more")
    starts = np.linspace(0, len(ids) - positions, wanted.texts).astype(int)
    return np.array([ids[start : start + positions] for start in starts], dtype=np.int64)
