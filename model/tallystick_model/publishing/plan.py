"""What will be published, found and checked before anything is written: cheap checks first, what takes a while last."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Literal

from tallystick_model.anatomy import LINEAR_TYPES, Anatomy, dissect
from tallystick_model.config import read_checkpoint
from tallystick_model.loader import vocabulary
from tallystick_model.publishing.canary import CANARY_TEXT, canary_ids
from tallystick_model.publishing.checkpoint import TensorSource
from tallystick_model.publishing.choosing import architecture_of, suggesting
from tallystick_model.publishing.companions import Companions, companions, pooling
from tallystick_model.publishing.context import max_length
from tallystick_model.publishing.generation import generation_settings
from tallystick_model.publishing.licence import find_licence
from tallystick_model.publishing.matching import Weights, as_stored, match
from tallystick_model.publishing.pieces import Encoding, PieceReader
from tallystick_model.publishing.precheck import Outline, check_disk, check_memory, peak_bytes
from tallystick_model.publishing.quantize import GROUPS, quantised_weights
from tallystick_model.publishing.rehearsal import rehearse
from tallystick_model.publishing.tasks import labels_of, task_of
from tallystick_model.skeleton import Skeleton, build_skeleton
from tallystick_protocol.content.cid import Cid
from tallystick_protocol.content.store import LocalStore, Store
from tallystick_protocol.errors import ManifestError
from tallystick_protocol.manifest import Canary, FileRef, Manifest, Numerics, Piece, PieceKind, Quantization

Quantize = Literal["int8", "int4"]
_NO_CID = Cid.of_raw(b"")
_LONG_NORMS = (1.23456e-100, 1234560000000000.0)
"""Norms that take as many characters as any."""


class Plan:
    """What a publication is made of. `check` tells whether it can be carried out, `reader` what each piece holds."""

    def __init__(
        self, source: TensorSource, *, name: str, licence: str | None = None, numerics: Numerics = "fp32",
        quantize: Quantize | None = None, architecture: str | None = None,
    ) -> None:  # fmt: skip
        """Reads no weight but the head and the table of a T5. Raises ManifestError for what cannot be served."""
        self.source, self.numerics = source, numerics
        self.name = _printable("name", name)
        self.licence = _printable("licence", licence or find_licence(source))
        read = read_checkpoint(source.config)
        self.unread = read.left_out
        self.config = as_stored(read.values, source)
        self.architecture = architecture_of(source, self.config, architecture)
        self.task = task_of(self.config, self.architecture)
        self.labels = labels_of(source.config, self.task)
        self.skeleton: Skeleton = build_skeleton(self.config, self.architecture, self.labels)
        self.anatomy: Anatomy = dissect(self.skeleton)
        self.vocab = vocabulary(self.skeleton.config)
        self.pooling = pooling(source) if self.anatomy.output == "hidden" else None
        self.max_length = max_length(self.skeleton, source)
        generates = self.task in ("text-generation", "text2text-generation") and self.anatomy.output == "logits"
        self.generation = generation_settings(source, self.vocab, needs_eos=generates)
        self.quantization = _quantization(quantize)
        self.encoding = self._encoding()
        with suggesting(source, self.config, self.architecture):
            self.weights: Weights = match(Outline(source), self.skeleton, self.anatomy)
        self.companions = Companions({}, ())

    def check(self, store: Store, written: Collection[str], scratch: Path) -> None:
        """Everything that is looked at before the first byte is written; what takes longest comes last.

        written: pieces that are in the store already. scratch: a folder for a tokenizer that is made. Raises
        ManifestError for what cannot be served exactly, ConfigError where disk or memory do not suffice.
        """
        self._check_room(store, written)
        self.companions = companions(self.source, self.vocab, scratch, CANARY_TEXT)
        self._check_manifest()
        rehearse(self.config, self.architecture, self.labels)
        self.weights = match(self.source, self.skeleton, self.anatomy)

    @property
    def names(self) -> list[str]:
        """Pieces in the manifest's order; `shared`, `embed` and `head` only where something is in them."""
        names = ["embed", *(f"layer.{index}" for index in range(len(self.anatomy.layers))), "shared", "head"]
        return [name for name in names if name.startswith("layer.") or self.anatomy.weights_of(name)]

    def reader(self, piece: str, said: Callable[[int], None] = lambda count: None) -> PieceReader:
        return PieceReader(piece, self.weights, self.anatomy.weights_of(piece), self.encoding, said)

    def piece(self, reader: PieceReader, cid: Cid) -> Piece:
        """What the manifest says of the piece that a reader makes."""
        kinds: dict[str, PieceKind] = {"embed": "embed", "shared": "shared", "head": "head"}
        number = int(reader.piece.removeprefix("layer.")) if reader.piece.startswith("layer.") else 0
        return Piece(kinds.get(reader.piece, "layer"), number, cid, reader.size, reader.tensors)

    def notes(self) -> list[str]:
        """What of the checkpoint is not published: what nothing that is served depends on, and what nothing reads."""
        shapes, others = self.skeleton.weights(), self.weights.left_out
        served = {self._first(name) for name in shapes.keys() - set(self.anatomy.unused)}
        unused = [name for name in self.anatomy.unused if self._first(name) not in served]  # tied: its other name is
        notes = []
        if unused:
            values = f"{len(unused)} weights ({sum(shapes[name].numel() for name in unused):,} values)"
            notes.append(f"{values}, {unused[0]} first, have no part in text and are left out")
        if others:
            what = f"tables that {self.architecture} computes, or weights of another class of its model type"
            notes.append(f"{len(others)} tensors, {others[0][:100]!r} first, are left out: {what}")
        if self.unread:
            notes.append(f"config keys that nothing in transformers reads are left out: {', '.join(self.unread)[:600]}")
        return notes

    def _first(self, name: str) -> str:
        """The first of the names that a tied weight has."""
        while name in self.skeleton.ties:
            name = self.skeleton.ties[name]
        return name

    def draft(self, pieces: list[Piece], tokenizer: dict[str, FileRef]) -> Manifest:
        """The manifest without its canary and norms."""
        anatomy = self.anatomy
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
            tokenizer=tokenizer,
            generation=self.generation,
            pooling=self.pooling,
            norms=(),
            canary=Canary((), (), _NO_CID),
        )

    def _check_room(self, store: Store, written: Collection[str]) -> None:
        if isinstance(store, LocalStore):
            check_disk(store.root, sum(self.reader(name).size for name in self.names if name not in written))
        shapes = self.skeleton.weights()
        count = {
            name: sum(shapes[weight].numel() for weight in self.anatomy.weights_of(name))
            for name in (*self.names, "embed", "shared", "head")
        }
        layers = [count[name] for name in self.names if name.startswith("layer.")]
        head = count["head"] + sum(shapes[weight].numel() for weight in self.anatomy.tied.values())
        largest = max((tensor.numel() for tensor in shapes.values()), default=0)
        check_memory(peak_bytes(layers, count["embed"], head, count["shared"], largest))

    def _check_manifest(self) -> None:
        """The manifest as it will be, but for what is not known yet, through the check that its readers make."""
        files = {name: FileRef(_NO_CID, len(content)) for name, content in self.companions.files.items()}
        draft = self.draft([self.piece(self.reader(name), _NO_CID) for name in self.names], files)
        boundaries = draft.layers + 1
        ids = tuple(int(token) for token in canary_ids(self.companions.canary, draft))
        canary = Canary(ids, (_NO_CID,) * boundaries, _NO_CID)
        Manifest.from_bytes(replace(draft, norms=(_LONG_NORMS,) * boundaries, canary=canary).to_bytes())

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


def _quantization(quantize: Quantize | None) -> Quantization | None:
    if quantize is None:
        return None
    bits: Literal[8, 4] = 8 if quantize == "int8" else 4
    return Quantization(bits, GROUPS[bits])


def _printable(what: str, text: str) -> str:
    if not 0 < len(text) <= 200 or not text.isprintable():
        raise ManifestError(f"the {what} {text[:40]!a} is not printable text of 1 to 200 characters: give a --{what}")
    return text
