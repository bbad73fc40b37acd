"""Source and target languages of translation models: which token or prefix names them.

Three conventions are known. Codes as special tokens, in the source text and as the first target token: M2M100
("__en__"), mBART ("en_XX"), NLLB ("eng_Latn"), PLBart ("__java__", "__en_XX__"). A target code before the source text:
Marian's models for several languages (">>fra<<"). Words before the source text: T5 ("translate English to German: "),
whose words the caller gives.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from tallystick.tokens import Tokens
from tallystick_protocol.errors import ConfigError

_CODE = re.compile(r"__[a-z]{2,12}(?:_[A-Z]{2})?__|[a-z]{2,3}_[A-Z]{2}|[a-z]{3}_[A-Z][a-z]{3}")
_PLBART = "__en_XX__"
_MARK = re.compile(r">>[A-Za-z_-]{2,20}<<")


def codes(tokens: Tokens) -> dict[str, int]:
    """The language codes among a tokenizer's special tokens, and their ids."""
    return {token: number for token, number in tokens.added.items() if _CODE.fullmatch(token)}


def code_of(tokens: Tokens, language: str) -> int:
    """The id of a language's code. Raises ConfigError naming some that there are."""
    known = codes(tokens)
    found = known.get(language, known.get(f"__{language}__"))
    if found is None:
        raise _unknown(language, known)
    return found


def _unknown(language: str, known: Collection[str]) -> ConfigError:
    return ConfigError(f"no language {language[:40]!r}; the model has {len(known)}: {', '.join(sorted(known)[:8])}…")


def source_ids(tokens: Tokens, text: str, source: str | None, target: str | None) -> list[int]:
    """A source text's ids, marked with its languages as the model's tokenizer does it. Raises ConfigError.

    Where special tokens hold a language code (the tokenizer's default source), the source language's takes its place.
    """
    known = codes(tokens)
    ids = tokens.encode(text)
    if known:
        if source is None:
            return ids
        wanted = code_of(tokens, source)
        special = tokens.analyse(text).special
        marks = [i for i, token in enumerate(ids) if special[i] and token in known.values()]
        if not marks:  # without a default source M2M100's code comes first, PLBart's last
            return [*ids, wanted] if _PLBART in known else [wanted, *ids]
        return [wanted if i in marks else token for i, token in enumerate(ids)]
    mark = None if target is None else tokens.id_of(f">>{target}<<")
    if target is not None and mark is None and (targets := tokens.matching(_MARK)):
        raise _unknown(target, targets)
    return ids if mark is None else [mark, *ids]


def target_code(tokens: Tokens, target: str | None) -> int | None:
    """The id that a translation begins with; None when the model knows no codes. Raises ConfigError."""
    return None if target is None or not codes(tokens) else code_of(tokens, target)
