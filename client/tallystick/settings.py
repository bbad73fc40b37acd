"""What a client is told of its world: the chain, what it may spend, how it checks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tallystick.court.keeping import KEPT_BYTES
from tallystick.routing.candidates import Weights
from tallystick.session.setting import Sketches
from tallystick_protocol.types import Digest, Wei
from tallystick_protocol.wire import Wire

log = logging.getLogger(__name__)

AUDIT_PROBABILITY = 0.05
DEFAULT_MAX_COST = Wei(10**19)


@dataclass(frozen=True, slots=True)
class Settings:
    """Where a client finds its world. numeric_class: insist on one class.

    admit_stock: with verify="off", use nodes of no numeric class for layers that nobody else serves (`admission`).
    wire: how hidden rows travel between hops: "f32", or rounded to "bf16" or "int8", which changes answers a little.
    sketches: whether hops are asked for sketches, by which nodes of other classes can audit them: "auto" where nobody
    else could, "on" or "off". Only of rows that travel as "f32".
    wait_s: how long an answer waits for a node when the last one of some layers is lost; notify: is told of it.
    evidence: folder of a content store for evidence against nodes that were found wrong, which holds the session's text
    or what it can be told from, for 14 days and within evidence_bytes; None: none is kept. accuse: put it up in Court,
    with a bond of the key's own tokens; evidence_sources: where jurors find it.
    recompute_bytes: pieces of one span that may be fetched so that the client itself is the third one where no other
    node can say who is wrong; with the extra `[node]` alone, and on a machine of the class in question. 0: it never is.
    """

    rpc: str = "http://127.0.0.1:8545"
    book: Path = Path("deployments/31337.json")
    cache: Path = Path("~/.cache/tallystick")
    sources: list[str] = field(default_factory=list)
    max_cost: Wei = DEFAULT_MAX_COST
    numeric_class: Digest | None = None
    admit_stock: bool = False
    audit_probability: float = AUDIT_PROBABILITY
    weights: Weights = field(default_factory=Weights)
    wire: Wire = "f32"
    sketches: Sketches = "auto"
    wait_s: float = 30.0
    evidence: Path | None = None
    evidence_bytes: int = KEPT_BYTES
    accuse: bool = False
    evidence_sources: list[str] = field(default_factory=list)
    recompute_bytes: int = 1 << 30
    notify: Callable[[str], None] = log.warning
