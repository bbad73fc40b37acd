"""Every expected failure, in one tree; each has a stable wire code.

TallystickError                      code, message, fields; never a stack trace on the wire
├── ProtocolError                    the sender broke a rule: its fault, nothing is retried
│   ├── BadFrame  BadMessage  BadSignature  BadPosition  BadTensor  WrongLayers  UnknownModel
│   ├── ContextLengthExceeded  SessionUnknown  SessionExists  Unauthorized  Rejected
│   └── PaymentError
│       ├── PaymentRequired          owed beyond credit: send a voucher
│       ├── InsufficientFunds        the channel does not hold the money: fund it
│       └── BadVoucher
├── Overloaded                       retry_after_s
├── Unreachable                      nobody's fault: link down, node gone, deadline passed
│   └── Departed                     the peer closed the connection in order
├── Draining                         the node will stop soon: move on to another one
├── LinkMismatch                     what one hop signed is not what the next one got
├── CorruptResult                    a result that was signed is wrong: evidence is kept
├── Equivocation                     a second claim for a window that was signed: refused
├── NoRoute                          layers nobody serves
├── NoAuditor                        spans nobody else can recompute
├── ChainError                       RPC down, reverted, wrong chain
├── ConfigError                      a setting, a key or a file of the user's own
├── ManifestError                    a model that is malformed, unsupported or not what it says
├── ContentError                     BadCid  BadBlock  BlockMissing  ContentTooLarge  SourceFailed
├── BadEvidence                      a bundle for the Court that does not hang together: unreadable
└── InternalError                    a bug on the other side
"""

from __future__ import annotations

import math
from typing import Any, ClassVar


class TallystickError(Exception):
    """An expected failure. `str(error)` is a sentence for a person: the cause and what to do next.

    `fields` travel with the code and hold what a handler needs (numbers, ids), never secrets or prompts.
    """

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 400

    def __init__(self, message: str, /, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields

    def to_wire(self) -> dict[str, Any]:
        """The body of an ERROR frame and of an HTTP error."""
        return {"code": self.code, "message": self.message, **self.fields}


class ProtocolError(TallystickError):
    code = "protocol_error"


class BadFrame(ProtocolError):
    code = "bad_frame"


class BadMessage(ProtocolError):
    code = "bad_message"


class BadSignature(ProtocolError):
    code = "bad_signature"
    status = 401


class BadPosition(ProtocolError):
    code = "bad_position"


class BadTensor(ProtocolError):
    code = "bad_tensor"


class WrongLayers(ProtocolError):
    code = "wrong_layers"


class UnknownModel(ProtocolError):
    code = "unknown_model"
    status = 404


class ContextLengthExceeded(ProtocolError):
    code = "context_length_exceeded"


class SessionUnknown(ProtocolError):
    code = "session_unknown"
    status = 404


class SessionExists(ProtocolError):
    code = "session_exists"
    status = 409


class Unauthorized(ProtocolError):
    code = "unauthorized"
    status = 401


class Rejected(ProtocolError):
    """An offer, limit or policy that does not fit: another node or other numbers may."""

    code = "rejected"
    status = 403


class PaymentError(ProtocolError):
    code = "payment_error"
    status = 402


class PaymentRequired(PaymentError):
    code = "payment_required"


class InsufficientFunds(PaymentError):
    code = "insufficient_funds"


class BadVoucher(PaymentError):
    code = "bad_voucher"


class Overloaded(TallystickError):
    code = "overloaded"
    status = 503


class Unreachable(TallystickError):
    code = "unreachable"
    status = 504


class Departed(Unreachable):
    code = "departed"


class Draining(TallystickError):
    code = "draining"
    status = 503


class LinkMismatch(TallystickError):
    code = "link_mismatch"
    status = 409


class CorruptResult(TallystickError):
    code = "corrupt_result"
    status = 502


class Equivocation(TallystickError):
    """Another digest was signed for the same window before: a second one is not signed."""

    code = "equivocation_refused"
    status = 409


class NoRoute(TallystickError):
    code = "no_route"
    status = 503


class NoAuditor(TallystickError):
    code = "no_auditor"
    status = 503


class ChainError(TallystickError):
    code = "chain_error"
    status = 503


class ConfigError(TallystickError):
    code = "config_error"


class ManifestError(TallystickError):
    code = "bad_manifest"


class ContentError(TallystickError):
    code = "content_error"
    status = 502


class BadCid(ContentError):
    code = "bad_cid"
    status = 400


class BadBlock(ContentError):
    """Bytes that do not match their CID, or malformed dag-pb."""

    code = "bad_block"


class BlockMissing(ContentError):
    """Nobody who was asked holds the block."""

    code = "block_missing"
    status = 404

    def __init__(self, cid: object, tried: list[str]) -> None:
        sought = ", ".join(tried) if tried else "no source"
        super().__init__(f"nobody asked holds {cid} (asked: {sought})", cid=str(cid), tried=tried)
        self.cid = cid
        self.tried = tried


class ContentTooLarge(ContentError):
    code = "content_too_large"
    status = 413


class SourceFailed(ContentError):
    """One source did not answer as it should; another may."""

    code = "source_failed"


class BadEvidence(TallystickError):
    """Evidence whose parts do not fit each other, or the model: a juror votes unreadable."""

    code = "bad_evidence"


class InternalError(TallystickError):
    """A bug on the other side, told without detail."""

    code = "internal_error"
    status = 500


def _tree(base: type[TallystickError]) -> list[type[TallystickError]]:
    return [base, *(deeper for child in base.__subclasses__() for deeper in _tree(child))]


def error_codes() -> dict[str, type[TallystickError]]:
    """Every wire code and the class it stands for."""
    return {cls.code: cls for cls in _tree(TallystickError)}


def from_wire(body: dict[str, Any]) -> TallystickError:
    """The error that an ERROR body stands for; an unknown code becomes its base class.

    Only short printable strings and finite numbers are taken over: the body comes from a peer.
    """
    cls = error_codes().get(_plain(body.get("code", ""), 40), TallystickError)
    message = _plain(body.get("message", ""), 500) or cls.code
    fields = {
        _plain(key, 40): value if _is_number(value) else _plain(value, 200)
        for key, value in list(body.items())[:16]
        if key not in ("code", "message")
    }
    error = cls.__new__(cls)
    TallystickError.__init__(error, message, **fields)
    return error


def _is_number(value: object) -> bool:
    return (isinstance(value, int) and abs(value) < 1 << 64) or (isinstance(value, float) and math.isfinite(value))


def _plain(value: object, length: int) -> str:
    """A peer's text as it may stand in a log or on a terminal; what is no scalar is only named."""
    text = str(value)[:length] if isinstance(value, str | int | float | None) else type(value).__name__
    return "".join(character if character.isprintable() else " " for character in text)
