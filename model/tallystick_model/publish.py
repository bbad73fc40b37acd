"""Publishing a checkpoint: its tensors streamed into pieces, its canary run span by span, one manifest written."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tallystick_model.publishing.canary import Walk, canary_ids
from tallystick_model.publishing.checkpoint import Checkpoint, TensorSource
from tallystick_model.publishing.gguf import GgufCheckpoint
from tallystick_model.publishing.job import Job, open_job
from tallystick_model.publishing.mxfp4 import Mxfp4Checkpoint, is_mxfp4
from tallystick_model.publishing.plan import Plan, Quantize
from tallystick_model.publishing.progress import Meter, Progress, Report, quiet
from tallystick_protocol.content.cid import Codec
from tallystick_protocol.content.store import LocalStore, Store
from tallystick_protocol.manifest import FileRef, Manifest, Numerics, Piece


def publish(
    checkpoint: Path,
    store: Store,
    *,
    name: str | None = None,
    licence: str | None = None,
    numerics: Numerics = "fp32",
    quantize: Quantize | None = None,
    architecture: str | None = None,
    progress: Report = quiet,
    work: Path | None = None,
    finish: Callable[[Manifest], object] = lambda manifest: None,
) -> Manifest:
    """Put a Hugging Face checkpoint folder, or a GGUF file, into the store piece by piece; returns its manifest.

    The same checkpoint and options give the same bytes. numerics and quantize make models of their own. architecture:
    the class that runs it, by default the one that config.json names. work: a folder for notes that let an interrupted
    run go on; by default in a local store, and none for another one. finish: what else belongs to the publication
    (pinning, registering); when it raises, or the run is interrupted, the notes stay. Memory: one layer in fp32 and
    what is next to it; disk: the model once. Raises ManifestError, naming the cause and what to do, for a checkpoint
    that cannot be served exactly; ConfigError when disk or memory do not suffice, or somebody else publishes the same.
    """
    with ExitStack() as stack:
        if work is None and isinstance(store, LocalStore):
            work = store.root / "publishing"
        elif work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tallystick-publish-")))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tallystick-tokenizer-")))
        source = _source_of(checkpoint, scratch)
        plan = Plan(
            source, name=name or _name_of(checkpoint), licence=licence, numerics=numerics, quantize=quantize,
            architecture=architecture,
        )  # fmt: skip
        identity = {
            "checkpoint": [str(checkpoint.resolve()), source.fingerprint()],
            "architecture": plan.architecture,
            "config": plan.config,
            "numerics": numerics,
            "quantize": quantize,
        }
        job = stack.enter_context(open_job(work, identity))
        plan.check(store, job.pieces(store).keys(), scratch)
        manifest = carry_out(plan, store, job, progress)
        finish(manifest)
        return manifest


def _source_of(checkpoint: Path, scratch: Path) -> TensorSource:
    if _is_gguf(checkpoint):
        return GgufCheckpoint(checkpoint, scratch)
    folder = Checkpoint(checkpoint)
    return Mxfp4Checkpoint(checkpoint) if is_mxfp4(folder) else folder


def _is_gguf(checkpoint: Path) -> bool:
    return checkpoint.suffix == ".gguf" and checkpoint.is_file()


def _name_of(checkpoint: Path) -> str:
    return checkpoint.stem if _is_gguf(checkpoint) else checkpoint.resolve().name


def carry_out(plan: Plan, store: Store, job: Job, progress: Report) -> Manifest:
    """Write what was planned; returns the manifest, which is in the store. Goes on from the job's notes."""
    for note in plan.notes():
        progress(Progress("note", note, 0, 0, None))
    files = {name: _kept(content, store) for name, content in sorted(plan.companions.files.items())}
    draft = plan.draft(_write(plan, store, job, progress), files)
    meter = Meter(progress, "canary", sum(piece.bytes for piece in draft.pieces if piece.kind == "layer"))
    manifest = Walk(draft, plan.anatomy, store, job, meter).calibrated(canary_ids(plan.companions.canary, draft))
    block = manifest.to_bytes()
    checked = Manifest.from_bytes(block)
    store.put_block(block, Codec.RAW)
    progress(Progress("done", str(checked.cid), 1, 1, 0.0))
    return checked


def _kept(content: bytes, store: Store) -> FileRef:
    return FileRef(store.put_file(io.BytesIO(content)), len(content))


def _write(plan: Plan, store: Store, job: Job, progress: Report) -> list[Piece]:
    written, pieces = job.pieces(store), []
    meter = Meter(progress, "pieces", sum(plan.reader(name).size for name in plan.names))
    for index, name in enumerate(plan.names):
        meter.begin(f"{name} ({index + 1} of {len(plan.names)})")
        if name in written:
            meter.skip(written[name].bytes)
        else:
            reader = plan.reader(name, meter.add)
            written[name] = plan.piece(reader, store.put_file(reader))
            job.note(written[name])
        pieces.append(written[name])
    meter.end()
    return pieces
