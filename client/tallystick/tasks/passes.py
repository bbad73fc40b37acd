"""One pass of a text through a one-stack model: the tokens in, the rows of the wanted positions out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tallystick.routing.candidates import Candidate
from tallystick.tasks.backend import Backend, Served, check_length, check_rows
from tallystick.tokens import Encoding
from tallystick.verdict import Policy, Verdict
from tallystick_protocol.manifest import Manifest


def values_of(manifest: Manifest) -> int:
    """How many numbers a row has."""
    if manifest.output == "logits":
        return manifest.vocab
    return manifest.width if manifest.output == "hidden" else len(manifest.labels)


def token_types(served: Served, encoding: Encoding) -> list[int] | None:
    """Segment numbers, for models that have them; None when all are 0, which is what models take without any."""
    inputs = served.tokens.settings.get("model_input_names")
    takes = "token_type_ids" in inputs if isinstance(inputs, list) else True
    known = int(served.manifest.config.get("type_vocab_size") or 1)
    return encoding.types if takes and known > 1 and any(encoding.types) else None


async def one_pass(
    backend: Backend, served: Served, encoding: Encoding, want: list[int] | None, verify: Policy
) -> tuple[np.ndarray, list[Candidate], Verdict]:
    """The rows (wanted positions, values) float32. want: positions, ascending; None for all (a "label" model: one).

    Raises ContextLengthExceeded, CorruptResult, and what sessions raise.
    """
    manifest = served.manifest
    check_length(manifest, len(encoding.ids))
    types = token_types(served, encoding)
    encoded = await backend.run(served.id, encoding.ids, token_types=types, want=want, verify=verify)
    count = 1 if manifest.output == "label" else len(encoding.ids) if want is None else len(want)
    return check_rows(encoded.rows, (count, values_of(manifest))), encoded.route, encoded.verdict


def longest(served: Served) -> int:
    """How many tokens a text may have: the model's positions, or fewer if its tokenizer's files say so."""
    said = served.tokens.max_length
    return served.manifest.max_length if said is None else min(said, served.manifest.max_length)


def analyse(served: Served, text: str, pair: str | None, truncate: bool) -> Encoding:
    """A text's tokens; with `truncate`, what is beyond the model's positions is left away."""
    encoding = served.tokens.analyse(text, pair)
    if truncate and len(encoding.ids) > longest(served):
        return served.tokens.windows(text, pair, longest(served), 0)[0]
    return encoding


def plain(ids: list[int]) -> Encoding:
    """Ids of which nothing is known."""
    none: list[int | None] = [None] * len(ids)
    return replace(_EMPTY, ids=ids, types=[0] * len(ids), offsets=[(0, 0)] * len(ids), special=[0] * len(ids),
                   texts=none, words=none)  # fmt: skip


_EMPTY = Encoding([], [], [], [], [], [])
