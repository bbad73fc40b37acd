"""tokenizer.json for tokenizers that transformers has in Python only (Marian, M2M100): runs in the worker.

Both cut a text up by SentencePiece's unigram model (Kudo 2018, arXiv:1804.10959) and look the pieces up in a vocab.json
whose ids are others. The same unigram model with its pieces in the order of vocab.json gives the same ids at once.
"""

from __future__ import annotations

import unicodedata
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import Unigram
from tokenizers.processors import TemplateProcessing

_UNIGRAM, _NORMAL = 1, 1
"""As in SentencePiece's sentencepiece_model.proto: a model's type, a piece's type."""

_LAST_RESORT, _NEVER = -1e6, -1e9
"""Scores of pieces that the source's model lacks. The worst text of known pieces is better than the first; the second
is for those with a letter that it knows, which it would not leave to them."""

_SAMPLE = " Who  keeps the longer half?\t12,345.67\n(naïve café) «Straße» – it's “so”… ¼ ﬁ Ａ １ 東京 Прагa "


def written_out(tokenizer: Any) -> Tokenizer:
    """A tokenizer of Python's as one of the tokenizers library: the same ids for all texts in letters that its model
    knows. Of other letters transformers makes one `unk` for a run, and here those that vocab.json has come one by one.

    Raises ValueError where it is of another kind, or gives other ids for a sample or its own pieces.
    """
    spm = getattr(tokenizer, "spm_source", None) or getattr(tokenizer, "sp_model", None)
    ids = getattr(tokenizer, "encoder", None)
    if spm is None or not isinstance(ids, dict) or getattr(tokenizer, "separate_vocabs", False):
        raise ValueError(f"{type(tokenizer).__name__} has no form that tokenizer.json can hold")
    proto = _read(spm.serialized_model_proto())
    if proto.trainer_spec.model_type != _UNIGRAM or proto.trainer_spec.byte_fallback:
        raise ValueError("its SentencePiece model is no unigram model, or falls back to bytes")
    made = Tokenizer(Unigram(_pieces(proto, ids), unk_id=ids[str(tokenizer.unk_token)], byte_fallback=False))
    spaces = [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    charsmap = proto.normalizer_spec.precompiled_charsmap
    made.normalizer = normalizers.Sequence([normalizers.Precompiled(charsmap), *spaces] if charsmap else spaces)
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    made.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in _marks(tokenizer, ids)])
    made.post_processor = _ends(tokenizer)
    _compare(tokenizer, made, proto)
    return made


def _read(content: bytes) -> Any:
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    proto.ParseFromString(content)
    return proto


def _pieces(proto: Any, ids: dict[str, int]) -> list[tuple[str, float]]:
    """Every id's piece and score."""
    if sorted(ids.values()) != list(range(len(ids))):
        raise ValueError("the ids of its vocab.json are not those from 0 on, each once")
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    letters = {letter for piece in scores for letter in piece}

    def score(piece: str) -> float:
        if piece in scores:
            return float(scores[piece])
        return _NEVER if not piece or letters.intersection(piece) else _LAST_RESORT

    return [(piece, score(piece)) for piece in sorted(ids, key=lambda piece: ids[piece])]


def _marks(tokenizer: Any, ids: dict[str, int]) -> list[str]:
    """Special tokens, and those that name languages: M2M100's have the ids behind its vocabulary's, in this order."""
    languages = getattr(tokenizer, "lang_token_to_id", {})
    if sorted(languages.values()) != list(range(len(ids), len(ids) + len(languages))):
        raise ValueError("the ids of its languages are not those behind its vocabulary")
    within = [str(text) for text in tokenizer.all_special_tokens if str(text) in ids]
    codes = getattr(tokenizer, "supported_language_codes", [])
    return [*within, *codes, *sorted(languages, key=lambda text: languages[text])]


def _ends(tokenizer: Any) -> Any:
    """What is put before and behind a text's ids."""
    middle = tokenizer.unk_token_id
    whole = tokenizer.build_inputs_with_special_tokens([middle])
    at = whole.index(middle)
    names = [str(tokenizer.convert_ids_to_tokens(id)) for id in whole]
    single = " ".join([*names[:at], "$A", *names[at + 1 :]])
    special = {name: id for name, id in zip(names, whole, strict=True) if id != middle}
    return TemplateProcessing(single=single, special_tokens=list(special.items()))


def _compare(tokenizer: Any, made: Tokenizer, proto: Any) -> None:
    """Raises ValueError unless both give the same ids for all that the model can spell."""
    pieces = [piece.piece.replace("▁", " ") for piece in proto.pieces[:4096] if piece.type == _NORMAL]
    letters = {letter for piece in pieces for letter in piece} | {"\t", "\n"}
    words = _SAMPLE.split(" ")
    spelled = " ".join(word for word in words if letters.issuperset(unicodedata.normalize("NFKC", word)))
    for text in (spelled, " ".join(pieces), "\U0010fffd"):
        if tokenizer(text)["input_ids"] != made.encode(text).ids:
            raise ValueError(f"{type(tokenizer).__name__} gives ids that no tokenizer.json would: of {text[:40]!r}")
