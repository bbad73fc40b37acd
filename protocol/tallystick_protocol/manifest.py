"""What a model is: one canonical dag-json block that names its pieces, their tensors and everything else that matters.

The manifest is one raw block of at most 1 MiB; its SHA-256 is what the contract `Models` records, together with the
Merkle root over the pieces (`weights`). Both are recomputed here by everybody who reads one.

    field         what
    format        "tallystick/1"
    name          for people
    licence       SPDX id or a sentence
    architecture  the transformers class that runs it, "LlamaForCausalLM"
    config        its config, allow-listed keys only (`tallystick_model.config` decides)
    task          what it was trained for, in the words of the model hubs: "text-generation", "fill-mask", …
    output        what leaves the last span: "logits" over the vocabulary (top-k or dense), "hidden" states,
                  "scores" (a row of len(labels) values per position), "label" (one such row, at the last position)
    labels        names of the scores, in order; empty for other outputs
    causal        true: a row depends on earlier rows only; false: on all rows of a one-shot session.
                  Of an encoder-decoder this is said of the decoder; its encoder is one-shot
    numerics      "fp32": weights, activations and cache in fp32, executed canonically; "bf16w": weights in bf16, inputs
                  and outputs of linear layers rounded to bf16, everything else in fp32
    quantization  null, or {"bits": 8|4, "group": values per scale}: weight-only, and a model of its own
    encoder_layers  0, or how many of the layers are the encoder's; they come first on the one axis of layers
    layers width vocab max_length
    pieces        ordered embed, layer 0.., shared, head: {kind, index, cid, bytes, tensors{name: {dtype, shape}}}
    tied          {tensor of the last span: the tensor of `embed` it shares}
    tokenizer     {file name: {cid, bytes}}
    generation    {eos: [ids], ...}; eos may be missing
    pooling       null, or {"mode": "mean"|"cls", "normalize": bool} for sentence embeddings
    norms         per boundary 0..layers: [smallest, largest] row norm that a node accepts
    canary        {ids, rows: [cid per boundary 0..layers], output: cid}: raw blocks of fp32 rows to be reproduced.
                  Of an encoder-decoder, boundary encoder_layers is the encoder's result (after its last norm, what the
                  decoder gets as memory), in norms and rows alike; the decoder's canary runs on the same ids over it
    clear         only where the publisher has measured it: the largest error across classes that is nothing but noise,
                  if that is less than the protocol's (`sketching.thresholds`)
    margins       only where they were measured: [[start, end, rare, usual, quiet], ...], the errors that honest windows
                  of a span seldom and at times exceed, and their quiet rows at times, if less than the protocol's
                  (`sketching.accumulating`); quiet may be left out
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Any, Literal

from eth_abi.abi import encode as abi_encode
from eth_utils.crypto import keccak

from tallystick_protocol import canonical_json
from tallystick_protocol.content.cid import Cid
from tallystick_protocol.errors import BadCid, ManifestError
from tallystick_protocol.manifest_checks import DTYPES, check
from tallystick_protocol.types import Digest, ModelId, Span

FORMAT = "tallystick/1"
MAX_BYTES = 1 << 20
_OPTIONAL = {"clear", "margins"}

Output = Literal["logits", "hidden", "scores", "label"]
Numerics = Literal["fp32", "bf16w"]
PieceKind = Literal["embed", "layer", "shared", "head"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """dtype as safetensors writes it ("F32", "BF16", …) and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        size = DTYPES[self.dtype]
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True, slots=True)
class Piece:
    """One safetensors file of a model. `index` is the layer's number for a layer, else 0."""

    kind: PieceKind
    index: int
    cid: Cid
    bytes: int
    tensors: dict[str, TensorSpec]

    @property
    def name(self) -> str:
        return f"layer.{self.index}" if self.kind == "layer" else self.kind


@dataclass(frozen=True, slots=True)
class FileRef:
    cid: Cid
    bytes: int


@dataclass(frozen=True, slots=True)
class Canary:
    """Rows that every node must reproduce before it registers.

    ids: token ids at positions 0.. ; rows[k]: the block of fp32 rows entering layer k (k = layers: leaving the last
    one); output: the block of rows that leave the last span: for logits the vocabulary's fp32 values of the last id,
    for hidden states the fp32 rows.
    """

    ids: tuple[int, ...]
    rows: tuple[Cid, ...]
    output: Cid


@dataclass(frozen=True, slots=True)
class Pooling:
    mode: Literal["mean", "cls"]
    normalize: bool


@dataclass(frozen=True, slots=True)
class Margin:
    """What was measured of one span between honest nodes of different classes: the errors that a window seldom has, and
    that it, and its quiet rows, have at times (`sketching.accumulating`); of results, over a window. quiet: None where
    it was not measured."""

    start: int
    end: int
    rare: float
    usual: float
    quiet: float | None = None


@dataclass(frozen=True, slots=True)
class Quantization:
    """Weight-only: matrices as integers of `bits`, one fp32 scale for `group` consecutive values of a row."""

    bits: Literal[8, 4]
    group: int


@dataclass(frozen=True, slots=True)
class Manifest:
    name: str
    licence: str
    architecture: str
    config: dict[str, Any]
    task: str
    output: Output
    labels: tuple[str, ...]
    causal: bool
    numerics: Numerics
    quantization: Quantization | None
    encoder_layers: int
    layers: int
    width: int
    vocab: int
    max_length: int
    pieces: tuple[Piece, ...]
    tied: dict[str, str]
    tokenizer: dict[str, FileRef]
    generation: dict[str, Any]
    pooling: Pooling | None
    norms: tuple[tuple[float, float], ...]
    canary: Canary
    clear: float | None = None
    margins: tuple[Margin, ...] = ()

    def stack_of(self, span: Span) -> Span:
        """The layers of the stack that a span belongs to. Raises ManifestError for one that crosses stacks."""
        self._has(span)
        cut = self.encoder_layers
        stack = Span(0, cut) if span.start < cut else Span(cut, self.layers)
        if span.end > stack.end:
            raise ManifestError(f"layers {span} reach over the end of the encoder at {cut}: a span is of one stack")
        return stack

    def takes_ids(self, span: Span) -> bool:
        """Whether token ids enter the span, not hidden states: it begins a stack."""
        return span.start == self.stack_of(span).start

    def is_result(self, span: Span) -> bool:
        """Whether what leaves the span is a result for the client: it ends a stack."""
        return span.end == self.stack_of(span).end

    def is_causal(self, span: Span) -> bool:
        """Whether sessions at the span grow row by row; else they take one step (encoders)."""
        return self.causal and span.start >= self.encoder_layers

    def is_decoder(self, span: Span) -> bool:
        """Whether the span attends to an encoder's states."""
        return 0 < self.encoder_layers <= span.start

    def output_of(self, span: Span) -> Output:
        """What leaves the span: hidden states but at the model's own end."""
        return self.output if span.end == self.layers else "hidden"

    def to_bytes(self) -> bytes:
        """The canonical block. Raises ManifestError when it is larger than MAX_BYTES."""
        block = canonical_json.encode(_to_json(self))
        if len(block) > MAX_BYTES:
            raise ManifestError(f"the manifest takes {len(block)} bytes, {MAX_BYTES} is the limit")
        return block

    @property
    def cid(self) -> Cid:
        return Cid.of_raw(self.to_bytes())

    @property
    def digest(self) -> Digest:
        return Digest(hashlib.sha256(self.to_bytes()).digest())

    @property
    def weights(self) -> Digest:
        return weights_root(self.pieces)

    @property
    def model_id(self) -> ModelId:
        return model_id(self.digest, self.weights, self.layers)

    @property
    def whole(self) -> Span:
        return Span(0, self.layers)

    def span_pieces(self, span: Span) -> tuple[Piece, ...]:
        """The pieces a span needs: its layers, `shared`, `embed` where a stack begins or a head is tied, `head` last.

        Raises ManifestError when the manifest has no such layers.
        """
        self._has(span)
        last = span.end == self.layers
        begins = span.start in (0, self.encoder_layers)
        wanted = {"shared"} | ({"embed"} if begins or (last and self.tied) else set())
        wanted |= {"head"} if last else set()
        return tuple(
            piece
            for piece in self.pieces
            if (span.start <= piece.index < span.end if piece.kind == "layer" else piece.kind in wanted)
        )

    def _has(self, span: Span) -> None:
        if span.end > self.layers:
            raise ManifestError(f"{self.name} has layers [0, {self.layers}), not {span}", layers=self.layers)

    @staticmethod
    def from_bytes(block: bytes) -> Manifest:
        """Parse and bound a manifest. Raises ManifestError naming the field that does not hold."""
        if len(block) > MAX_BYTES:
            raise ManifestError(f"the manifest takes {len(block)} bytes, {MAX_BYTES} is the limit")
        manifest = _from_json(canonical_json.decode(block))
        check(manifest)
        if manifest.to_bytes() != block:  # else its digest would not be the block's
            raise ManifestError("the manifest holds unknown keys, or writes a value in another way than this version")
        return manifest


def weights_root(pieces: Iterable[Piece]) -> Digest:
    """`Models.sol`'s Merkle root over the pieces: OpenZeppelin's sorted pairs, an odd node promoted.

    leaf = keccak256(keccak256(abi.encode(uint256 index, bytes32 cidDigest, uint64 byteLength)))
    """
    level = [
        keccak(keccak(abi_encode(["uint256", "bytes32", "uint64"], [index, piece.cid.digest, piece.bytes])))
        for index, piece in enumerate(pieces)
    ]
    if not level:
        raise ManifestError("a model without pieces")
    while len(level) > 1:
        pairs = [level[i : i + 2] for i in range(0, len(level), 2)]
        level = [keccak(b"".join(sorted(pair))) if len(pair) == 2 else pair[0] for pair in pairs]
    return Digest(level[0])


def model_id(manifest: Digest, weights: Digest, layers: int) -> ModelId:
    """keccak256(abi.encode(manifest, weights, uint16 layers)): the model's id on chain."""
    return ModelId(keccak(abi_encode(["bytes32", "bytes32", "uint16"], [manifest, weights, layers])))


def _to_json(manifest: Manifest) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "name": manifest.name,
        "licence": manifest.licence,
        "architecture": manifest.architecture,
        "config": manifest.config,
        "task": manifest.task,
        "output": manifest.output,
        "labels": list(manifest.labels),
        "causal": manifest.causal,
        "numerics": manifest.numerics,
        "quantization": None
        if manifest.quantization is None
        else {"bits": manifest.quantization.bits, "group": manifest.quantization.group},
        "encoder_layers": manifest.encoder_layers,
        "layers": manifest.layers,
        "width": manifest.width,
        "vocab": manifest.vocab,
        "max_length": manifest.max_length,
        "pieces": [
            {
                "kind": piece.kind,
                "index": piece.index,
                "cid": _link(piece.cid),
                "bytes": piece.bytes,
                "tensors": {
                    name: {"dtype": spec.dtype, "shape": list(spec.shape)} for name, spec in piece.tensors.items()
                },
            }
            for piece in manifest.pieces
        ],
        "tied": manifest.tied,
        "tokenizer": {name: {"cid": _link(ref.cid), "bytes": ref.bytes} for name, ref in manifest.tokenizer.items()},
        "generation": manifest.generation,
        "pooling": None
        if manifest.pooling is None
        else {"mode": manifest.pooling.mode, "normalize": manifest.pooling.normalize},
        "norms": [[float(low), float(high)] for low, high in manifest.norms],
        "canary": {
            "ids": list(manifest.canary.ids),
            "rows": [_link(cid) for cid in manifest.canary.rows],
            "output": _link(manifest.canary.output),
        },
        **({} if manifest.clear is None else {"clear": manifest.clear}),
        **({} if not manifest.margins else {"margins": [_margin(one) for one in manifest.margins]}),
    }


def _margin(one: Margin) -> list[float]:
    return [part for part in astuple(one) if part is not None]


def _from_json(value: Any) -> Manifest:
    try:
        if value["format"] != FORMAT:
            raise ManifestError(f"manifest format {str(value['format'])[:40]!r}; this version reads {FORMAT!r}")
        keys = {*Manifest.__slots__, "format"}
        if set(value) | _OPTIONAL != keys:
            raise ManifestError(f"manifest fields differ: {sorted(set(value) ^ keys)[:5]}")
        return Manifest(
            **{
                **{key: value[key] for key in keys - {"format"} - _OPTIONAL},
                "clear": value.get("clear"),
                "margins": tuple(Margin(*one) for one in value.get("margins", ())),
                "labels": tuple(value["labels"]),
                "quantization": None if value["quantization"] is None else Quantization(**value["quantization"]),
                "pieces": tuple(_piece(piece) for piece in value["pieces"]),
                "tokenizer": {
                    name: FileRef(_cid(ref["cid"]), ref["bytes"]) for name, ref in value["tokenizer"].items()
                },
                "pooling": None if value["pooling"] is None else Pooling(**value["pooling"]),
                "norms": tuple((float(low), float(high)) for low, high in value["norms"]),
                "canary": Canary(
                    tuple(value["canary"]["ids"]),
                    tuple(_cid(link) for link in value["canary"]["rows"]),
                    _cid(value["canary"]["output"]),
                ),
            }
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, BadCid) as error:
        raise ManifestError(f"malformed manifest: {type(error).__name__} {str(error)[:120]}") from None


def _piece(value: dict[str, Any]) -> Piece:
    tensors = {str(name): TensorSpec(spec["dtype"], tuple(spec["shape"])) for name, spec in value["tensors"].items()}
    return Piece(value["kind"], value["index"], _cid(value["cid"]), value["bytes"], tensors)


def _link(cid: Cid) -> dict[str, str]:
    return {"/": str(cid)}


def _cid(link: Any) -> Cid:
    if not isinstance(link, dict) or set(link) != {"/"} or not isinstance(link["/"], str):
        raise ManifestError('a link is {"/": "<cid>"}')
    return Cid.parse(link["/"])
