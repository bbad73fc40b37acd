"""Publishing a checkpoint: its tensors streamed into pieces, its canary run span by span, one manifest written."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from tallystick_model.anatomy import LINEAR_TYPES, Anatomy, dissect
from tallystick_model.config import checkpoint_config
from tallystick_model.loader import vocabulary
from tallystick_model.publishing.canary import CANARY_TEXT, Walk, canary_ids
from tallystick_model.publishing.checkpoint import Checkpoint, TensorSource
from tallystick_model.publishing.companions import Companions, companions, find_licence, generation_settings, pooling
from tallystick_model.publishing.context import max_length
from tallystick_model.publishing.gguf import GgufCheckpoint
from tallystick_model.publishing.job import Job, open_job
from tallystick_model.publishing.matching import Weights, as_stored, match
from tallystick_model.publishing.pieces import Encoding, PieceReader
from tallystick_model.publishing.precheck import check_disk, check_memory, peak_bytes
from tallystick_model.publishing.progress import Meter, Progress, Report, quiet
from tallystick_model.publishing.quantize import GROUPS, quantised_weights
from tallystick_model.publishing.rehearsal import rehearse
from tallystick_model.publishing.tasks import labels_of, task_of
from tallystick_model.skeleton import Skeleton, build_skeleton
from tallystick_protocol.content.cid import Cid, Codec
from tallystick_protocol.content.store import LocalStore, Store
from tallystick_protocol.errors import ManifestError
from tallystick_protocol.manifest import (
    Canary,
    FileRef,
    Manifest,
    Numerics,
    Piece,
    PieceKind,
    Quantization,
)

Quantize = Literal["int8", "int4"]


def publish(
    checkpoint: Path,
    store: Store,
    *,
    name: str | None = None,
    licence: str | None = None,
    numerics: Numerics = "fp32",
    quantize: Quantize | None = None,
    progress: Report = quiet,
    work: Path | None = None,
) -> Manifest:
    """Put a Hugging Face checkpoint folder, or a GGUF file, into the store piece by piece; returns its manifest.

    The same checkpoint and options give the same bytes. numerics and quantize make models of their own. work: a folder
    for notes that let an interrupted run go on; by default in a local store, and none for another one. Memory: one
    layer in fp32 and what is next to it; disk: the model once. Raises ManifestError, naming the cause and what to do,
    for a checkpoint that cannot be served exactly; ConfigError when disk or memory do not suffice, or somebody else
    publishes the same.
    """
    with ExitStack() as stack:
        if work is None and isinstance(store, LocalStore):
            work = store.root / "publishing"
        elif work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tallystick-publish-")))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tallystick-tokenizer-")))
        source: TensorSource = GgufCheckpoint(checkpoint, scratch) if _is_gguf(checkpoint) else Checkpoint(checkpoint)
        plan = _Plan(source, numerics, quantize, scratch, name or checkpoint.stem, licence)
        plan.check_room(store)
        identity = {
            "checkpoint": [str(checkpoint.resolve()), source.fingerprint()],
            "config": plan.config,
            "numerics": numerics,
            "quantize": quantize,
        }
        job = stack.enter_context(open_job(work, identity))
        return plan.carry_out(store, job, progress)


def _is_gguf(checkpoint: Path) -> bool:
    return checkpoint.suffix == ".gguf" and checkpoint.is_file()


class _Plan:
    """What will be published, found and checked before anything is written."""

    def __init__(
        self, source: TensorSource, numerics: Numerics, quantize: Quantize | None, scratch: Path, name: str,
        licence: str | None,
    ) -> None:  # fmt: skip
        self.source, self.numerics = source, numerics
        self.name, self.licence = name, licence or find_licence(source)
        self.architecture = _architecture(source)
        self.config = as_stored(checkpoint_config(source.config), source)
        self.task = task_of(self.config, self.architecture)
        self.labels = labels_of(source.config, self.task)
        self.skeleton: Skeleton = build_skeleton(self.config, self.architecture, self.labels)
        self.anatomy: Anatomy = dissect(self.skeleton)
        rehearse(self.config, self.architecture, self.labels)
        self.weights: Weights = match(source, self.skeleton, self.anatomy)
        self.vocab = vocabulary(self.skeleton.config)
        self.max_length = max_length(self.skeleton, source)
        generates = self.task in ("text-generation", "text2text-generation") and self.anatomy.output == "logits"
        self.generation = generation_settings(source, self.vocab, needs_eos=generates)
        self.companions: Companions = companions(source, self.vocab, scratch, CANARY_TEXT)
        self.quantization = None
        if quantize is not None:
            bits: Literal[8, 4] = 8 if quantize == "int8" else 4
            self.quantization = Quantization(bits, GROUPS[bits])
        self.encoding = self._encoding()

    def _encoding(self) -> Encoding:
        roles, rounded = self.anatomy.roles, frozenset[str]()
        if self.numerics == "bf16w":
            modules = self.skeleton.model.named_modules()
            linear = {f"{name}.weight" for name, module in modules if type(module) in LINEAR_TYPES}
            rounded = frozenset(linear & roles.keys())
        if self.quantization is None:
            return Encoding(rounded, frozenset(), None)
        chosen = quantised_weights(self.skeleton, roles, self.quantization)
        return Encoding(rounded - chosen, chosen, self.quantization)

    def reader(self, piece: str, said: Callable[[int], None] = lambda count: None) -> PieceReader:
        return PieceReader(piece, self.weights, self.anatomy.weights_of(piece), self.encoding, said)

    @property
    def names(self) -> list[str]:
        """Pieces in the manifest's order; `shared`, `embed` and `head` only where something is in them."""
        names = ["embed", *(f"layer.{index}" for index in range(len(self.anatomy.layers))), "shared", "head"]
        return [name for name in names if name.startswith("layer.") or self.anatomy.weights_of(name)]

    def check_room(self, store: Store) -> None:
        """Raises ConfigError when the disk of a local store, or memory, is too small."""
        if isinstance(store, LocalStore):
            check_disk(store.root, sum(self.reader(name).size for name in self.names))
        shapes = self.skeleton.weights()
        count = {
            name: sum(shapes[weight].numel() for weight in self.anatomy.weights_of(name))
            for name in (*self.names, "embed", "shared", "head")
        }
        layers = [count[name] for name in self.names if name.startswith("layer.")]
        head = count["head"] + sum(shapes[weight].numel() for weight in self.anatomy.tied.values())
        largest = max((tensor.numel() for tensor in shapes.values()), default=0)
        check_memory(peak_bytes(layers, count["embed"], head, count["shared"], largest))

    def carry_out(self, store: Store, job: Job, progress: Report) -> Manifest:
        if left_out := self._left_out():
            progress(Progress("note", left_out, 0, 0, None))
        draft = self._draft(self._write(store, job, progress), store)
        meter = Meter(progress, "canary", sum(piece.bytes for piece in draft.pieces if piece.kind == "layer"))
        manifest = Walk(draft, self.anatomy, store, job, meter).calibrated(canary_ids(self.companions.canary, draft))
        block = manifest.to_bytes()
        checked = Manifest.from_bytes(block)
        store.put_block(block, Codec.RAW)
        progress(Progress("done", str(checked.cid), 1, 1, 0.0))
        return checked

    def _left_out(self) -> str:
        """What of the model is not published, since nothing that is served depends on it: towers, poolers."""
        shapes, unused = self.skeleton.weights(), self.anatomy.unused
        if not unused:
            return ""
        count = sum(shapes[name].numel() for name in unused)
        return f"{len(unused)} weights ({count:,} values), {unused[0]} first, have no part in text and are left out"

    def _write(self, store: Store, job: Job, progress: Report) -> list[Piece]:
        written, pieces = job.pieces(store), []
        readers = {name: self.reader(name) for name in self.names}
        meter = Meter(progress, "pieces", sum(reader.size for reader in readers.values()))
        kinds: dict[str, PieceKind] = {"embed": "embed", "shared": "shared", "head": "head"}
        for index, name in enumerate(self.names):
            meter.begin(f"{name} ({index + 1} of {len(self.names)})")
            if name in written:
                meter.skip(written[name].bytes)
            else:
                reader = self.reader(name, meter.add)
                number = int(name.removeprefix("layer.")) if name.startswith("layer.") else 0
                cid = store.put_file(reader)
                written[name] = Piece(kinds.get(name, "layer"), number, cid, reader.size, reader.tensors)
                job.note(written[name])
            pieces.append(written[name])
        meter.end()
        return pieces

    def _draft(self, pieces: list[Piece], store: Store) -> Manifest:
        """The manifest without its canary and norms."""
        anatomy, files = self.anatomy, self.companions.files
        return Manifest(
            name=self.name,
            licence=self.licence,
            architecture=self.architecture,
            config=self.config,
            task=self.task,
            output=anatomy.output,
            labels=self.labels,
            causal=anatomy.causal,
            numerics=self.numerics,
            quantization=self.quantization,
            encoder_layers=anatomy.encoder_layers,
            layers=len(anatomy.layers),
            width=anatomy.width,
            vocab=self.vocab,
            max_length=self.max_length,
            pieces=tuple(pieces),
            tied=anatomy.tied,
            tokenizer={
                file: FileRef(store.put_file(io.BytesIO(content)), len(content))
                for file, content in sorted(files.items())
            },
            generation=self.generation,
            pooling=pooling(self.source) if anatomy.output == "hidden" else None,
            norms=(),
            canary=Canary((), (), Cid.of_raw(b"")),
        )


def _architecture(source: TensorSource) -> str:
    named = source.config.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise ManifestError("config.json must name one class in `architectures`")
    return named[0]
