"""The bounds of a manifest: what everything that comes after the parser relies on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tallystick_protocol.errors import ManifestError

if TYPE_CHECKING:
    from tallystick_protocol.manifest import Manifest

MAX_LAYERS = 4096
MAX_TENSORS_PER_PIECE = 4096
MAX_PIECE_BYTES = 1 << 40
MAX_EOS = 64
MAX_LABELS = 4096
DTYPES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1}

TASKS = (
    "text-generation",
    "fill-mask",
    "feature-extraction",
    "text-classification",
    "token-classification",
    "question-answering",
    "text2text-generation",
)
_ORDER: dict[str, int] = {"embed": 0, "layer": 1, "shared": 2, "head": 3}


def check(manifest: Manifest) -> None:
    """Raises ManifestError naming the field that is out of the bounds on which everything after the parser relies."""
    for name, high in (("layers", MAX_LAYERS), ("width", 1 << 17), ("vocab", 1 << 22), ("max_length", 1 << 22)):
        _bounded(f"{name}", getattr(manifest, name), 1, high)
    _one_of("task", manifest.task, TASKS)
    _one_of("output", manifest.output, ("logits", "hidden", "scores", "label"))
    _one_of("numerics", manifest.numerics, ("fp32", "bf16w"))
    _check_labels(manifest)
    _bounded("encoder_layers", manifest.encoder_layers, 0, manifest.layers - 1)
    if manifest.quantization is not None:
        _one_of("quantization bits", manifest.quantization.bits, (8, 4))
        _bounded("quantization group", manifest.quantization.group, 16, 1 << 20)
    _one_of("causal", manifest.causal, (True, False))
    if not all(isinstance(value, dict) for value in (manifest.config, manifest.generation, manifest.tied)):
        raise ManifestError("config, generation and tied are objects")
    eos = manifest.generation.get("eos", [])
    if not isinstance(eos, list) or len(eos) > MAX_EOS:
        raise ManifestError(f"generation eos is a list of at most {MAX_EOS} ids")
    for token in eos:
        _bounded("an eos id", token, 0, manifest.vocab - 1)
    for text in (manifest.name, manifest.licence, manifest.architecture):
        if not isinstance(text, str) or not 0 < len(text) <= 200 or not text.isprintable():
            raise ManifestError("name, licence and architecture are printable text of at most 200 characters")
    if manifest.pooling is not None:
        _one_of("pooling mode", manifest.pooling.mode, ("mean", "cls"))
        _one_of("pooling normalize", manifest.pooling.normalize, (True, False))
    _check_pieces(manifest)
    known = {name for piece in manifest.pieces if piece.kind == "embed" for name in piece.tensors}
    if any(not isinstance(source, str) or source not in known for source in manifest.tied.values()):
        raise ManifestError("a tied tensor names one that is not in the embed piece")
    if len(manifest.norms) != manifest.layers + 1 or any(not 0 <= low < high for low, high in manifest.norms):
        raise ManifestError("norms: one [smallest, largest] for each of the layers + 1 boundaries")
    if len(manifest.canary.rows) != manifest.layers + 1 or not 0 < len(manifest.canary.ids) <= 1024:
        raise ManifestError("canary: some ids and one block of rows for each of the layers + 1 boundaries")
    for token in manifest.canary.ids:
        _bounded("canary id", token, 0, manifest.vocab - 1)
    if manifest.clear is not None and not (type(manifest.clear) is float and 0 < manifest.clear < 1):
        raise ManifestError("clear is a number between 0 and 1, or missing")
    _check_margins(manifest)
    for name, ref in manifest.tokenizer.items():
        unsafe = name != name.strip() or not name.isprintable() or any(part in name for part in ("/", "\\", ".."))
        if unsafe or not 0 < len(name) <= 100:
            raise ManifestError(f"tokenizer file name {name[:40]!r}")
        _bounded(f"bytes of {name}", ref.bytes, 1, 1 << 28)


def _check_margins(manifest: Manifest) -> None:
    for one in manifest.margins:
        _bounded("a margin's start", one.start, 0, manifest.layers - 1)
        _bounded("a margin's end", one.end, one.start + 1, manifest.layers)
        if not (type(one.rare) is type(one.usual) is float and 0 < one.usual <= one.rare < 1):
            raise ManifestError("a margin's levels are numbers between 0 and 1, the usual one at most the rare one")
        if one.quiet is not None and not (type(one.quiet) is float and 0 < one.quiet <= one.rare):
            raise ManifestError("a margin's quiet level is a number above 0, at most the rare one")
    spans = [(one.start, one.end) for one in manifest.margins]
    if spans != sorted(set(spans)):
        raise ManifestError("margins are in the order of their spans, one for each")


def _check_labels(manifest: Manifest) -> None:
    if bool(manifest.labels) != (manifest.output in ("scores", "label")) or len(manifest.labels) > MAX_LABELS:
        raise ManifestError(f"labels name the scores of a classifier, at most {MAX_LABELS}, and nothing else has any")
    for label in manifest.labels:
        if not isinstance(label, str) or not 0 < len(label) <= 100 or not label.isprintable():
            raise ManifestError("a label is printable text of at most 100 characters")


def _check_pieces(manifest: Manifest) -> None:
    kinds = [piece.kind for piece in manifest.pieces]
    if any(not isinstance(kind, str) or kind not in _ORDER for kind in kinds):
        raise ManifestError("a piece is embed, layer, shared or head")
    if [_ORDER[kind] for kind in kinds] != sorted(_ORDER[kind] for kind in kinds):
        raise ManifestError("pieces come in the order embed, layers, shared, head")
    for kind in ("embed", "shared", "head"):
        if kinds.count(kind) > 1:
            raise ManifestError(f"two {kind} pieces")
    if [piece.index for piece in manifest.pieces if piece.kind == "layer"] != list(range(manifest.layers)):
        raise ManifestError(f"the layer pieces are not 0 to {manifest.layers - 1}, each once")
    seen: set[str] = set()
    for piece in manifest.pieces:
        _bounded(f"index of {piece.name}", piece.index, 0, MAX_LAYERS)
        _bounded(f"bytes of {piece.name}", piece.bytes, 1, MAX_PIECE_BYTES)
        if len(piece.tensors) > MAX_TENSORS_PER_PIECE:
            raise ManifestError(f"{piece.name} lists {len(piece.tensors)} tensors")
        if piece.kind != "layer" and piece.index != 0:
            raise ManifestError(f"{piece.name} has an index")
        for name, spec in piece.tensors.items():
            _one_of(f"dtype of {name}", spec.dtype, tuple(DTYPES))
            if len(spec.shape) > 8:
                raise ManifestError(f"{name} has {len(spec.shape)} dimensions")
            for length in spec.shape:
                _bounded(f"shape of {name}", length, 0, 1 << 32)
        if seen & set(piece.tensors):
            raise ManifestError(f"a tensor of {piece.name} is in another piece, too")
        seen |= set(piece.tensors)
        if sum(spec.bytes for spec in piece.tensors.values()) > piece.bytes:
            raise ManifestError(f"the tensors of {piece.name} do not fit into its {piece.bytes} bytes")


def _bounded(what: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ManifestError(f"{what} is {str(value)[:40]}, not an integer from {low} to {high}")


def _one_of(what: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
        raise ManifestError(f"{what} is {str(value)[:40]!r}, not one of {allowed}")
