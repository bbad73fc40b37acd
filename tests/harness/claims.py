"""Receipts over rows, as a node would have signed them, and the bundle about the last one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from harness import samples
from tallystick_protocol.evidence.bundle import Bundle
from tallystick_protocol.receipts import Context, Receipt, leaf, merkle_root, rows_root
from tallystick_protocol.signing import Domain, Key, digest, seal
from tallystick_protocol.types import WINDOW, ZERO32


def claim(
    receipt: Receipt,
    inputs: Sequence[bytes],
    outputs: Sequence[bytes],
    want: Sequence[bool],
    *,
    context: Context,
    key: Key,
    domain: Domain = samples.STAKING,
    one_shot: bool = False,
    between: bool = False,
    closing: dict[str, Any] | None = None,
    **parts: Any,
) -> Bundle:
    """receipt: its node, model, class, session, attempt and span are taken over. outputs: empty where there is none.

    between: the span is followed by another one, so that every position has an output. closing: a closing receipt
    comes last, which says these things otherwise. parts: of the bundle.
    """
    sealed, previous = [], ZERO32
    size = len(want) if one_shot else WINDOW
    for first in range(0, len(want), size):
        window = slice(first, min(first + size, len(want)))
        signed = replace(
            receipt,
            first=first,
            last=window.stop,
            context=replace(context, want=tuple(want[window])).digest(),
            input=rows_root(inputs[window]),
            output=merkle_root([leaf(row) for row in outputs[window]]),
            previous=previous,
        )
        previous = digest(domain, signed)
        sealed.append(seal(domain, signed, key))
    if closing is not None:
        answered = replace(signed, challenge=samples.digest("challenge"), sketches=samples.digest("sketches"))
        closed = replace(answered, **{"revision": signed.revision + 1, "previous": previous, **closing})
        sealed.append(seal(domain, closed, key))
    last = [row for row in outputs[signed.first :] if row]
    values: dict[str, Any] = {
        "numerics": context.numerics, "wire": context.wire, "top_k": context.top_k, "sealed": tuple(sealed),
        "want": tuple(want), "inputs": tuple(inputs), "outputs": tuple(last), "all_outputs": between,
    }  # fmt: skip
    return Bundle(**{**values, **parts})
