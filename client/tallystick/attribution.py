"""What a disagreement or a failure is put down to before anybody is blamed: pure, and always one of five causes.

The causes are asked for in their order (docs/verification.md); only the last one accuses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from tallystick_protocol.errors import (
    BadBlock,
    ChainError,
    Draining,
    LinkMismatch,
    Overloaded,
    PaymentRequired,
    SessionUnknown,
    TallystickError,
    Unreachable,
)
from tallystick_protocol.types import Address, Positions, Span

Cause = Literal["overload", "link", "protocol", "numerics", "fraud"]
CAUSES: tuple[str, ...] = get_args(Cause)

_OVERLOAD = (Overloaded, Unreachable, Draining, SessionUnknown, PaymentRequired, ChainError)
_LINK = (LinkMismatch, BadBlock)


@dataclass(frozen=True, slots=True)
class Attribution:
    """What one failure or disagreement over a span was put down to.

    code: the error's wire code, or "disagreement". avoided: nodes that this session uses no more. accused: who was
    contradicted by `witnesses`, alike; only where the cause is fraud. positions: None where it was about no window.
    """

    cause: Cause
    span: Span
    code: str
    avoided: tuple[Address, ...] = ()
    accused: Address | None = None
    witnesses: tuple[Address, ...] = ()
    positions: Positions | None = None

    def to_json(self) -> dict[str, Any]:
        at = self.positions
        return {
            "cause": self.cause,
            "layers": [self.span.start, self.span.end],
            "positions": None if at is None else [at.first, at.last],
            "code": self.code,
            "avoided": list(self.avoided),
            "accused": self.accused,
            "witnesses": list(self.witnesses),
        }


def cause_of(failure: TallystickError) -> Cause:
    """What a node's failure is put down to: it was late, busy or gone (overload); bytes are not those that were signed
    for (link); or it broke another rule (protocol)."""
    if isinstance(failure, _OVERLOAD):
        return "overload"
    return "link" if isinstance(failure, _LINK) else "protocol"


def cause_of_difference(failure: TallystickError | None, same_input: bool, overruled: bool) -> Cause:
    """What it is put down to that two nodes signed different outputs.

    overruled: whether a third one has computed the same and one of the two stands alone: what is signed cannot be
    excused by what came later. failure: of either of them meanwhile. same_input: whether both signed the same input.
    """
    if same_input and overruled:
        return "fraud"
    if failure is not None:
        return cause_of(failure)
    return "numerics" if same_input else "link"


def failed(failure: TallystickError, node: Address, span: Span) -> Attribution:
    """A node failed by itself; it is avoided from now on, and nobody is accused."""
    return Attribution(cause_of(failure), span, failure.code, avoided=(node,))
