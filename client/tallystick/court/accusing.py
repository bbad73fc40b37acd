"""Going to Court: evidence kept and served by CID, and the transaction that accuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tallystick.court.keeping import keep_evidence
from tallystick_protocol.chain.court import case_id
from tallystick_protocol.chain.docket import Docket, encode_sources, receipt_words
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.content.cid import Cid
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.errors import BadEvidence, BlockMissing, ChainError, ConfigError
from tallystick_protocol.evidence.bundle import MAX_BYTES
from tallystick_protocol.evidence.checking import Evidence, read_evidence
from tallystick_protocol.signing import SIGNATURE_BYTES, Domain
from tallystick_protocol.types import Digest, Wei


@dataclass(frozen=True, slots=True)
class Accused:
    """A case as it was opened."""

    id: Digest
    cid: Cid
    bond: Wei


def load_evidence(text: str, store: LocalStore, domain: Domain) -> tuple[Evidence, Cid]:
    """A bundle by file name or CID; a file is kept in the store first. Raises ConfigError, BadEvidence."""
    if Path(text).is_file():
        with Path(text).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        evidence = read_evidence(domain, data)
        return evidence, keep_evidence(store, data)
    cid = Cid.parse(text)
    path = store.root / "new" / f"{cid}.evidence"
    try:
        store.read_file(cid, path, MAX_BYTES)
        return read_evidence(domain, path.read_bytes()), cid
    except BlockMissing:
        raise ConfigError(f"{text} is neither a file nor in the store {store.root}; set --store") from None
    finally:
        path.unlink(missing_ok=True)


def accuse(
    wallet: Wallet, evidence: Evidence, cid: Cid, sources: Sequence[str], max_bond: Wei | None = None
) -> Accused:
    """Open a case with the bond of the wallet's own tokens. Blocking.

    sources: where jurors find the evidence, numeric addresses; they ask the accuser's node, too, if it is one.
    Raises BadEvidence, ConfigError for a bond beyond max_bond, ChainError.
    """
    chain, docket = wallet.chain, Docket(wallet.chain)
    accused = evidence.accused
    if any(chain.node_of(signer) != accused.node for signer in evidence.signers):
        raise BadEvidence("not every receipt in it is signed by a key of the accused node: jurors will not read it")
    bond = docket.bond(accused, evidence.digest)
    if not bond:
        raise ChainError(f"nothing can be won from {accused.node}: it has no stake, or was slashed as far as it may be")
    if max_bond is not None and bond > max_bond:
        raise ConfigError(f"the bond is {bond} token units, more than the {max_bond} that were allowed")
    hint = encode_sources(sources)
    wallet.send("approving the bond", chain.token.functions.approve(chain.court.address, bond))
    call = chain.court.functions.open(receipt_words(accused), evidence.bundle.sealed[-1][-SIGNATURE_BYTES:], cid.digest)
    wallet.send("accusing", call, hint)
    return Accused(case_id(evidence.digest, Digest(cid.digest)), cid, bond)
