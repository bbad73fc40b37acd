"""Does a bundle hang together: signatures, chain, roots, and the model it is about.

What fails is `BadEvidence`, which a juror calls unreadable. Nothing here says whether the accused computed rightly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tallystick_protocol.errors import BadEvidence, ManifestError, ProtocolError, WrongLayers
from tallystick_protocol.evidence.bundle import Bundle
from tallystick_protocol.frames import VALUE_BYTES
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.receipts import Context, Receipt, leaf, merkle_root, rows_root
from tallystick_protocol.signing import Domain, digest, unseal
from tallystick_protocol.types import WINDOW, ZERO32, Address, Digest
from tallystick_protocol.wire import DTYPES, values_per_row

_SAME = ("node", "model", "numeric_class", "session", "attempt", "start", "end")


@dataclass(frozen=True, slots=True)
class Evidence:
    """A bundle whose parts fit each other.

    receipts: window by window, the accused one last; behind the last window's its closing receipt, if that is accused.
    digest: the accused one's. signers: who signed them, which only the chain can tie to the accused.
    """

    bundle: Bundle
    receipts: tuple[Receipt, ...]
    digest: Digest
    signers: frozenset[Address]

    @property
    def accused(self) -> Receipt:
        return self.receipts[-1]

    @property
    def num_windows(self) -> int:
        return len(self.receipts) - _is_closed(self.receipts)


def read_evidence(domain: Domain, data: bytes | memoryview, accused: Digest | None = None) -> Evidence:
    """Parse and check. domain: Staking's. accused: digest of the receipt that it has to be about.

    Raises BadEvidence.
    """
    bundle = Bundle.decode(data)
    try:
        opened = [unseal(domain, Receipt, sealed) for sealed in bundle.sealed]
    except ProtocolError as error:
        raise BadEvidence(f"a receipt in it is none: {error.message}") from None
    receipts = tuple(receipt for receipt, _ in opened)
    digests = [digest(domain, receipt) for receipt in receipts]
    if accused is not None and digests[-1] != accused:
        raise BadEvidence("it is about another receipt than the accused one")
    _check_chain(receipts, digests, bundle.num_positions)
    _check_roots(bundle, receipts)
    return Evidence(bundle, receipts, digests[-1], frozenset(signer for _, signer in opened))


def check_model(evidence: Evidence, manifest: Manifest) -> None:
    """Raises BadEvidence unless rows, windows and side inputs have the form that the model's span takes.

    The values of rows are left to whoever computes on them.
    """
    bundle, span = evidence.bundle, evidence.accused.span
    try:
        manifest.stack_of(span)
        causal, is_result = manifest.is_causal(span), manifest.is_result(span)
    except (ManifestError, WrongLayers) as error:
        raise BadEvidence(f"the receipts are about no span of the model: {error.message}") from None
    if bundle.numerics != manifest.numerics or bundle.num_positions > manifest.max_length:
        raise BadEvidence("the receipts are about other numerics, or more positions, than the model has")
    if not causal and evidence.num_windows != 1:
        raise BadEvidence("a span in which a row depends on later ones has one window")
    if causal and evidence.num_windows != (bundle.num_positions + WINDOW - 1) // WINDOW:
        raise BadEvidence("a causal span has windows of 32 positions")
    takes_ids = manifest.takes_ids(span)
    if len(bundle.inputs[0]) != (4 if takes_ids else hidden_bytes(bundle, manifest)):
        raise BadEvidence("input rows of another length than the span takes")
    if bundle.token_types and (causal or not takes_ids):
        raise BadEvidence("token types belong to the ids of a one-shot session")
    if bool(bundle.memory) != manifest.is_decoder(span) or (
        bundle.memory and len(bundle.memory[0]) != 4 * manifest.width
    ):
        raise BadEvidence("an encoder's states belong to a decoder's span, a row of the model's width each")
    if bundle.outputs is not None:
        _check_outputs(bundle, manifest, evidence.accused, is_result)


def result_bytes(bundle: Bundle, manifest: Manifest, receipt: Receipt) -> int:
    """The bytes of one row that leaves the span."""
    if not manifest.is_result(receipt.span):
        return hidden_bytes(bundle, manifest)
    output = manifest.output_of(receipt.span)
    if output == "hidden":
        return 4 * manifest.width
    if output == "logits":
        return 8 * min(bundle.top_k, manifest.vocab) or 4 * manifest.vocab
    return 4 * len(manifest.labels)


def hidden_bytes(bundle: Bundle, manifest: Manifest) -> int:
    """The bytes of one hidden row between hops."""
    return values_per_row(bundle.wire, manifest.width) * VALUE_BYTES[DTYPES[bundle.wire]]


def output_leaves(bundle: Bundle, accused: Receipt) -> list[Digest]:
    """The leaves of the accused window's output rows; a position without one has the leaf of the empty row."""
    rows = iter(bundle.outputs or ())
    want = bundle.want[accused.first : accused.last]
    return [leaf(next(rows) if asked or bundle.all_outputs else b"") for asked in want]


def _check_outputs(bundle: Bundle, manifest: Manifest, accused: Receipt, is_result: bool) -> None:
    if bundle.all_outputs == is_result:
        raise BadEvidence("output rows are the wanted ones at the model's end, and all of them elsewhere")
    if bundle.outputs and len(bundle.outputs[0]) != result_bytes(bundle, manifest, accused):
        raise BadEvidence("output rows of another length than leave the span")


def _check_chain(receipts: Sequence[Receipt], digests: Sequence[Digest], positions: int) -> None:
    accused, windows = receipts[-1], len(receipts) - _is_closed(receipts)
    for index, receipt in enumerate(receipts):
        if any(getattr(receipt, name) != getattr(accused, name) for name in _SAME):
            raise BadEvidence("the receipts are not of one node, model, class, session, attempt and span")
        window = min(index, windows - 1)
        last = positions if window == windows - 1 else WINDOW * (window + 1)
        if (receipt.first, receipt.last) != (WINDOW * window, last):
            raise BadEvidence(f"receipt {index} is about positions {receipt.positions}")
        if receipt.previous != (digests[index - 1] if index else ZERO32):
            raise BadEvidence(f"receipt {index} does not name the one before it")


def _is_closed(receipts: Sequence[Receipt]) -> bool:
    """Whether the last receipt is about the window of the one before it, as only a closing one is."""
    return len(receipts) > 1 and receipts[-1].first == receipts[-2].first


def _check_roots(bundle: Bundle, receipts: Sequence[Receipt]) -> None:
    types = merkle_root([leaf(bytes([one])) for one in bundle.token_types]) if bundle.token_types else None
    memory = rows_root(bundle.memory) if bundle.memory else None
    for receipt in receipts:
        window = slice(receipt.first, receipt.last)
        context = Context(bundle.numerics, bundle.wire, bundle.top_k, bundle.want[window], types, memory)
        if context.digest() != receipt.context:
            raise BadEvidence(f"side inputs of positions {receipt.positions} are not those that were signed")
        if rows_root(bundle.inputs[window]) != receipt.input:
            raise BadEvidence(f"input rows of positions {receipt.positions} do not hash to what was signed")
    if bundle.outputs is not None and merkle_root(output_leaves(bundle, receipts[-1])) != receipts[-1].output:
        raise BadEvidence("output rows do not hash to what was signed")
