"""tokenizer.json for tokenizers that transformers has in Python only (Marian, M2M100, PLBart, BertGeneration): runs in
the worker.

They cut a text up by a model of SentencePiece's, unigram (Kudo 2018, arXiv:1804.10959) or byte-pair encoding (Sennrich
et al. 2016, arXiv:1508.07909), and give the pieces ids that may be others than the model's: a vocab.json's, or moved by
one. The same model with its pieces in the order of those ids gives them at once.
"""

from __future__ import annotations

import unicodedata
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram
from tokenizers.processors import TemplateProcessing

_UNIGRAM, _BPE, _NORMAL, _USER_DEFINED = 1, 2, 1, 4
"""As in SentencePiece's sentencepiece_model.proto: two types of models, two types of pieces."""

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
    ids = getattr(tokenizer, "encoder", None) or (None if spm is None else tokenizer.get_vocab())
    if spm is None or not isinstance(ids, dict) or getattr(tokenizer, "separate_vocabs", False):
        raise ValueError(f"{type(tokenizer).__name__} has no form that tokenizer.json can hold")
    proto = _read(spm.serialized_model_proto())
    if proto.trainer_spec.model_type not in (_UNIGRAM, _BPE) or proto.trainer_spec.byte_fallback:
        raise ValueError("its SentencePiece model is neither unigram nor byte-pair encoding, or falls back to bytes")
    made = Tokenizer(_model(proto, ids, str(tokenizer.unk_token)))
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


def _model(proto: Any, ids: dict[str, int], unknown: str) -> Any:
    if sorted(ids.values()) != list(range(len(ids))):
        raise ValueError("the ids of its vocab.json are not those from 0 on, each once")
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    if proto.trainer_spec.model_type == _UNIGRAM:
        return Unigram(_pieces(scores, ids), unk_id=ids[unknown], byte_fallback=False)
    return BPE(ids, _merges(scores, ids), unk_token=unknown, fuse_unk=True)


def _merges(scores: dict[str, float], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces that make another one, in the order in which SentencePiece joins them: the best score first."""
    known = scores.keys() & ids.keys()
    made = sorted((piece for piece in known if len(piece) > 1), key=lambda piece: -scores[piece])
    pairs = [(piece[:at], piece[at:]) for piece in made for at in range(1, len(piece))]
    return [(left, right) for left, right in pairs if left in known and right in known]


def _pieces(scores: dict[str, float], ids: dict[str, int]) -> list[tuple[str, float]]:
    """Every id's piece and score."""
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
    taken_first = [f"e{piece.piece}e" for piece in proto.pieces if piece.type == _USER_DEFINED]
    letters = {letter for piece in pieces for letter in piece} | {"\t", "\n"}
    words = _SAMPLE.split(" ")
    spelled = " ".join(word for word in words if letters.issuperset(unicodedata.normalize("NFKC", word)))
    for text in (spelled, " ".join(pieces), " ".join(taken_first), "\U0010fffd"):
        if tokenizer(text)["input_ids"] != made.encode(text).ids:
            raise ValueError(f"{type(tokenizer).__name__} gives ids that no tokenizer.json would: of {text[:40]!r}")
