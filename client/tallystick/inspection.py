"""Looking at models: what is on chain, and whether a model's content is what its manifest says."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tallystick.piece_files import check_piece_file
from tallystick_protocol.chain.reads import Chain, ModelRecord
from tallystick_protocol.content.cid import Cid, Codec
from tallystick_protocol.content.fetch import fetch_file
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.errors import BlockMissing, ConfigError, ManifestError, TallystickError
from tallystick_protocol.manifest import MAX_BYTES, Manifest, Piece
from tallystick_protocol.types import Span

CANARY_BYTES = 1 << 26


@dataclass(frozen=True, slots=True)
class Entry:
    """A model on chain, with its manifest when somebody has it."""

    record: ModelRecord
    manifest: Manifest | None

    @property
    def cid(self) -> Cid:
        """Of the manifest."""
        return Cid(Codec.RAW, self.record.manifest)

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "id": "0x" + self.record.id.hex(),
            "manifest": str(self.cid),
            "layers": self.record.layers,
        }
        manifest = self.manifest
        if manifest is not None:
            found |= {
                "name": manifest.name,
                "architecture": manifest.architecture,
                "task": manifest.task,
                "numerics": manifest.numerics,
                "quantization": None if manifest.quantization is None else asdict(manifest.quantization),
                "bytes": sum(piece.bytes for piece in manifest.pieces),
                "max_length": manifest.max_length,
                "licence": manifest.licence,
            }
        return found

    def lines(self) -> list[str]:
        """For a person: the whole id, to be copied, and what the model is."""
        known = self.manifest
        said = f"{self.record.layers} layers"
        if known is not None:
            size = sum(piece.bytes for piece in known.pieces)
            amount = f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
            said = ", ".join((known.task, said, known.numerics, f"{weights_of(known)} weights", amount, known.licence))
        name = "(its manifest is not found)" if known is None else known.name
        return [f"0x{self.record.id.hex()}", f"  {name}: {said}", f"  manifest {self.cid}"]


def weights_of(manifest: Manifest) -> str:
    """How a manifest's weights are stored: "int8", "int4", or the widest type, "F32"."""
    if manifest.quantization is not None:
        return f"int{manifest.quantization.bits}"
    held = {spec.dtype for piece in manifest.pieces for spec in piece.tensors.values()}
    return "+".join(sorted(held))


async def list_models(chain: Chain, store: Path, sources: Sequence[str]) -> list[Entry]:
    """Every model on chain with its manifest: from the store, a source, or a node that serves the model; else None."""
    entries = []
    with tempfile.TemporaryDirectory(prefix="tallystick-models-") as folder:
        for record in await asyncio.to_thread(chain.all_models):
            serving = await asyncio.to_thread(chain.serving, record.id)
            nodes = [source for node in serving[:8] for source in node.contact.sources]
            local = LocalStore(store) if store.is_dir() else None
            desk = Desk(local, [*sources, *nodes], Path(folder))
            manifest = None
            with suppress(TallystickError):
                path = await desk.file(Cid(Codec.RAW, record.manifest), MAX_BYTES)
                manifest = Manifest.from_bytes(path.read_bytes())
                if manifest.model_id != record.id:
                    manifest = None
            entries.append(Entry(record, manifest))
    return entries


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at: ok, or what is wrong."""

    what: str
    ok: bool
    detail: str


@dataclass(slots=True)
class Report:
    """What `verify_model` found."""

    cid: str
    name: str = ""
    model: str = ""
    bytes: int = 0
    deep: bool = False
    checks: list[Check] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return bool(self.checks) and all(check.ok for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "sound": self.sound}

    def lines(self) -> list[str]:
        """The report for people."""
        shown = [f"{'ok ' if check.ok else 'BAD'}  {check.what}: {check.detail}" for check in self.checks]
        wrong = sum(not check.ok for check in self.checks)
        how = "and its canary is reproduced" if self.deep else "(its canary was not run: --deep)"
        end = f"sound: {self.bytes} bytes are what the manifest says {how}" if not wrong else f"{wrong} checks failed"
        return [f"{self.name or self.cid} {self.model}", *shown, end]


async def verify_model(text: str, store: Path, sources: Sequence[str], *, deep: bool = False) -> Report:
    """Fetch a manifest and everything it names, check every CID, tensor and value; deep: run the canary, too.

    text: the manifest's CID. store: a content store that is asked first; what is fetched for the check is not kept.
    Raises ConfigError for a text that is no CID, or without torch for a deep check; all else is in the report.
    """
    try:
        cid = Cid.parse(text)
    except TallystickError as error:
        raise ConfigError(f"{text[:80]!r} is not the CID of a manifest ({error.message})") from None
    report = Report(str(cid), deep=deep)
    with tempfile.TemporaryDirectory(prefix="tallystick-verify-") as folder:
        desk = Desk(LocalStore(store) if store.is_dir() else None, sources, Path(folder))
        inspection = _Inspection(report, desk)
        manifest = await inspection.manifest(cid)
        if manifest is not None:
            await inspection.small_files(manifest)
            await inspection.pieces(manifest)
    return report


class Desk:
    """Files on the table for a look: from a local store, else from a source through a store that goes afterwards."""

    def __init__(self, store: LocalStore | None, sources: Sequence[str], folder: Path) -> None:
        self._store, self._sources, self._folder = store, sources, folder

    async def file(self, cid: Cid, max_bytes: int) -> Path:
        path = self._folder / str(cid)
        if path.exists():
            return path
        if self._store is not None and self._store.has(cid):
            await asyncio.to_thread(self._store.read_file, cid, path, max_bytes)
            return path
        if not self._sources:
            raise BlockMissing(cid, [str(self._store.root)] if self._store else [])
        with tempfile.TemporaryDirectory(dir=self._folder) as passing:
            await fetch_file(cid, path, self._sources, store=LocalStore(Path(passing)), max_bytes=max_bytes)
        return path

    def drop(self, cid: Cid) -> None:
        (self._folder / str(cid)).unlink(missing_ok=True)

    def path(self, piece: Piece) -> Path:
        return self._folder / str(piece.cid)

    def block(self, cid: Cid) -> bytes:
        return (self._folder / str(cid)).read_bytes()


class _Inspection:
    def __init__(self, report: Report, desk: Desk) -> None:
        self._report, self._desk = report, desk

    async def manifest(self, cid: Cid) -> Manifest | None:
        try:
            manifest = Manifest.from_bytes((await self._desk.file(cid, MAX_BYTES)).read_bytes())
        except TallystickError as error:
            self._note("manifest", error)
            return None
        report = self._report
        report.name, report.model = manifest.name, "0x" + manifest.model_id.hex()
        report.bytes = sum(piece.bytes for piece in manifest.pieces)
        said = f"{manifest.architecture}, {manifest.layers} layers, {manifest.numerics}, {weights_of(manifest)}"
        report.checks.append(Check("manifest", True, f"{said}, {manifest.licence}"))
        return manifest

    async def small_files(self, manifest: Manifest) -> None:
        wanted = [(f"tokenizer {name}", ref.cid, ref.bytes) for name, ref in sorted(manifest.tokenizer.items())]
        rows = (*manifest.canary.rows, manifest.canary.output)
        wanted += [(f"canary block {index}", cid, CANARY_BYTES) for index, cid in enumerate(rows)]
        for what, cid, limit in wanted:
            try:
                size = (await self._desk.file(cid, limit)).stat().st_size
                exact = what.startswith("tokenizer") and size != limit
                if exact:
                    raise ManifestError(f"it has {size} bytes, the manifest says {limit}")
            except TallystickError as error:
                self._note(what, error)
            else:
                self._report.checks.append(Check(what, True, f"{size} bytes"))

    async def pieces(self, manifest: Manifest) -> None:
        """Every piece; with a deep report each layer's canary as soon as its pieces are there."""
        kept = [piece for piece in manifest.pieces if piece.kind != "layer"]
        for piece in kept:
            await self._piece(piece)
        run = await asyncio.to_thread(self._canary, manifest) if self._report.deep else None
        for piece in manifest.pieces:
            if piece.kind == "layer":
                sound = await self._piece(piece)
                if sound and run is not None:
                    await asyncio.to_thread(self._reproduce, run, piece.index)
                self._desk.drop(piece.cid)
        if self._report.deep and run is None and all(check.ok for check in self._report.checks):
            self._report.checks.append(Check("canary", False, "was not run"))

    async def _piece(self, piece: Piece) -> bool:
        try:
            path = await self._desk.file(piece.cid, piece.bytes)
            await asyncio.to_thread(check_piece_file, path, piece)
        except TallystickError as error:
            self._note(piece.name, error)
            return False
        detail = f"{piece.bytes} bytes, {len(piece.tensors)} tensors"
        self._report.checks.append(Check(piece.name, True, detail))
        return True

    def _canary(self, manifest: Manifest) -> Callable[[Span], float] | None:
        """What runs the canary over a span; None where the manifest contradicts its own config."""
        try:
            from tallystick_model.canary import check_canary
            from tallystick_model.loader import checked_anatomy, load_span
        except ImportError:
            raise ConfigError("--deep takes torch: pip install 'tallystick[torch]'") from None
        try:
            checked_anatomy(manifest)
        except TallystickError as error:
            self._note("config and tensors", error)
            return None
        self._report.checks.append(Check("config and tensors", True, "the config makes the tensors that are listed"))
        return lambda span: check_canary(load_span(manifest, span, self._desk.path), manifest, self._desk.block)

    def _reproduce(self, run: Callable[[Span], float], layer: int) -> None:
        what = f"canary over layer {layer}"
        try:
            error = run(Span(layer, layer + 1))
        except TallystickError as wrong:
            self._note(what, wrong)
        except OSError:
            self._report.checks.append(Check(what, False, "a file that it needs could not be had"))
        else:
            self._report.checks.append(Check(what, True, f"relative error {error:.1e}"))

    def _note(self, what: str, error: TallystickError) -> None:
        self._report.checks.append(Check(what, False, error.message))
