"""What a node says of itself beside its signed offer: nobody signs it, so every figure is looked at, or left out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tallystick.routing.candidates import LAYER_S, Expected
from tallystick.routing.cost import LONGEST_S
from tallystick_protocol.errors import BadMessage
from tallystick_protocol.signing import address_bytes, checksum_address
from tallystick_protocol.types import Address

MAX_LINKS = 64
"""Neighbours of which a node's distances are heard."""

STEP_ROWS = 8
"""`rows_per_s` is of steps of so many rows; a step of one takes about as long, for it reads the same weights."""


@dataclass(frozen=True, slots=True)
class Claims:
    """delivers: what it claims. serves_parts: whether it takes sessions over a part of its span. links: seconds there
    and back to other nodes."""

    delivers: Expected = field(default_factory=Expected)
    serves_parts: bool = False
    links: Mapping[Address, float] = field(default_factory=dict)


def read_claims(status: object, num_layers: int) -> Claims:
    """The `status` of `/v1/info` of a node that serves so many layers. What makes no sense counts as not said.

    rows_per_s: through its span, as it measured before serving. step_ms: a decode step's forward at present; row_ms: a
    row in a prompt's. backlog_ms: how long what waits will take. parts: whether it serves parts. links_ms: by node.
    """
    told: Mapping[Any, Any] = status if isinstance(status, dict) else {}
    rate = _figure(told.get("rows_per_s"))
    step_ms = _figure(told.get("step_ms"))
    if step_ms is not None:
        layer_s = step_ms / 1e3 / num_layers
    else:
        layer_s = min(STEP_ROWS / rate / num_layers, LONGEST_S) if rate else LAYER_S
    row_ms = _figure(told.get("row_ms"))
    if row_ms is not None:
        prefill_s = row_ms / 1e3 / num_layers
    else:
        prefill_s = min(1 / rate / num_layers, LONGEST_S) if rate else layer_s / STEP_ROWS
    wait_s = (_figure(told.get("backlog_ms")) or 0.0) / 1e3
    return Claims(Expected(layer_s, prefill_s, wait_s), told.get("parts") is True, _links(told.get("links_ms")))


def _figure(value: object) -> float | None:
    """A number from 0 to an hour in milliseconds or rows, or None."""
    if type(value) not in (int, float):
        return None
    number = float(value) if isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 62) else math.nan
    return number if math.isfinite(number) and 0 <= number <= LONGEST_S * 1e3 else None


def _links(told: object) -> dict[Address, float]:
    found: dict[Address, float] = {}
    for text, value in list(told.items())[:MAX_LINKS] if isinstance(told, dict) else []:
        milliseconds = _figure(value)
        try:
            node = checksum_address(address_bytes(Address(str(text)[:64])))
        except BadMessage:
            continue
        if milliseconds is not None:
            found[node] = milliseconds / 1e3
    return found
