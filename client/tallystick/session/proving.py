"""Which numeric classes count for a client: what its sessions see of them, and where they look first.

A class counts once two of its nodes, of operators and payees that have nobody in common, have signed the same output
for the same rows (`routing.proven`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from tallystick.admission import has_class
from tallystick.routing.candidates import Candidate
from tallystick.routing.choice import owners
from tallystick.routing.proven import Proven
from tallystick.verdict import Verdict
from tallystick_protocol.receipts import Receipt
from tallystick_protocol.types import Address

if TYPE_CHECKING:
    from tallystick.session.session import Session


def agreed(session: Session, claim: Receipt, one: Collection[Address], other: Collection[Address]) -> None:
    """Two owners' nodes have signed this output, of `claim`'s class. A window that no row was asked of proves nothing:
    its root is the same whatever was computed."""
    if not session.setting.manifest.is_result(claim.span) or any(session.want[claim.first : claim.last]):
        session.setting.proven.note(claim.numeric_class, one, other)


def succeeded(session: Session, before: Receipt, after: Receipt) -> None:
    """Whoever took a hop's place has signed what that one had signed, if both are still known."""
    known = {c.node: c for c in session.setting.candidates}
    if before.node in known and after.node in known:
        agreed(session, after, owners([known[before.node]]), owners([known[after.node]]))


def unproven(session: Session) -> list[int]:
    """Hops of a class that does not count yet, and that another operator of it could recompute."""
    counts, peers = session.setting.proven.counts, session.openings.peers
    return [
        index
        for index, hop in enumerate(session.route)
        if has_class(hop) and not counts(hop.offer.numeric_class) and peers(index)
    ]


def note_unproven(verdict: Verdict, hops: Iterable[Candidate], proven: Proven) -> None:
    """Record in a verdict which hops are of a class that does not count yet, when the answer is there."""
    found = [(hop.node, hop.span) for hop in hops if has_class(hop) and not proven.counts(hop.offer.numeric_class)]
    verdict.unproven += [one for one in found if one not in verdict.unproven]
