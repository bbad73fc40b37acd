"""Layers that nobody serves, and the command that would change that."""

from __future__ import annotations

from tallystick_protocol.errors import NoRoute
from tallystick_protocol.types import Span


def unserved(said: str, span: Span, model: str = "") -> NoRoute:
    """An error that names layers and ends with the command for a node to serve them.

    model: the model's id (0x and 64 hex digits), where a node must say which of several on chain it serves.
    """
    which = f" --model {model}" if model else ""
    fields = {"start": span.start, "end": span.end} | ({"model": model} if model else {})
    return NoRoute(f"{said}: tallystick-node run --join --span {span.start}:{span.end}{which}", **fields)
