"""What nodes were seen to deliver, by one client, across its sessions: it takes the place of what they say.

A client measures whole steps: the sum of what all hops took. Each node has a belief about its seconds per layer, with a
doubt; what a step took beyond expectation is told apart by doubts, as a Kalman filter's update for a sum tells it: who
is well known explains little, who is new explains most. Beliefs are forgotten with time (an Ornstein-Uhlenbeck process
towards the claim), and a doubt never falls so low that a node that changes would not be noticed in a few sessions.
A node that says it has become slower is believed; that it has become faster, if it has delivered what it said before.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tallystick.routing.candidates import Candidate, Expected
from tallystick.routing.cost import HOP_S, LONGEST_S, bounded, links_s, measured_work
from tallystick.routing.remembered import latest, newer, read, write
from tallystick_protocol.types import Address

HALF_LIFE_S = 3600.0
LEAST_DOUBT = 1 / 16
"""Of a node that is well known; 1 of one that was never used. Variances, relative to the squared step time."""

HONEST = 1.25
"""A node that delivers its claim within this factor has said the truth."""

MODESTY = 0.8
"""A node may be this part of what it claims, no faster."""

NOISE = 0.1
"""Standard deviation of a session's median step around what its hops take, relative to it."""

FAILURES, SESSIONS = 0.1, 2.0
"""What is taken to have happened before anything did: one failure in twenty sessions."""

MAX_NODES = 10_000
VERSION = 1


@dataclass(frozen=True, slots=True)
class Belief:
    """About one node. layer_s: seconds per layer, waiting included; claim: what it said when that was measured.

    doubt: variance of layer_s, from LEAST_DOUBT to 1. failures, sessions: counts, forgotten like the rest. at: unix
    seconds of the last change.
    """

    layer_s: float
    claim: float
    doubt: float
    failures: float
    sessions: float
    at: float


class Reputation:
    """Beliefs about nodes, kept in a file if one is given."""

    def __init__(self, path: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        """path: read if it is there; what cannot be read is started anew."""
        self._path = path
        self._clock = clock
        self._beliefs = _read(path)

    def __len__(self) -> int:
        return len(self._beliefs)

    def is_sure_of(self, node: Address) -> bool:
        """Whether what is expected of a node rests on measurements rather than on its word."""
        known = self._beliefs.get(node)
        return known is not None and self._now(node, known.claim).doubt < 0.5

    def inform(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """Candidates with what is to be expected of them."""
        return [replace(c, expected=self.expect(c.node, c.claimed, len(c.offer.span))) for c in candidates]

    def expect(self, node: Address, claimed: Expected, num_layers: int) -> Expected:
        """What to expect of a node that claims this for a span of so many layers."""
        claim = per_layer(claimed, num_layers)
        belief = self._now(node, claim)
        more = belief.layer_s - claim
        layer_s = min(max(bounded(claimed.layer_s) + more, 0.0), LONGEST_S)
        scale = layer_s / claimed.layer_s if claimed.layer_s > 0 and more > 0 else 1.0
        failure = (belief.failures + FAILURES) / (belief.sessions + SESSIONS)
        return Expected(layer_s, bounded(claimed.prefill_s * scale), bounded(claimed.wait_s), failure)

    def observe(self, hops: Sequence[Candidate], step_s: float, deviation_s: float = 0.0) -> None:
        """A session ended in which a decode step took so long (a median), give or take its deviation."""
        self._beliefs |= self.after(hops, step_s, deviation_s)
        self._forget_some()

    def after(
        self, hops: Sequence[Candidate], step_s: float, deviation_s: float = 0.0, noise: float = NOISE
    ) -> dict[Address, Belief]:
        """The beliefs about a route's nodes as they would be after such an observation.

        noise: relative standard deviation of the measurement; 0 to explain it wholly.
        """
        beliefs = [self._now(hop.node, claim_of(hop)) for hop in hops]
        now = self._clock()
        if math.isfinite(step_s) and step_s > 0:
            computing_s = step_s - links_s(hops, measured_work()) - HOP_S * len(hops)
            beliefs = _told_apart(hops, beliefs, max(computing_s, 0.0), noise, deviation_s)
        return {hop.node: replace(belief, at=now) for hop, belief in zip(hops, beliefs, strict=True)}

    def served(self, node: Address) -> None:
        """A node carried a session to its end, or until it was left."""
        self._count(node, 0.0)

    def lost(self, node: Address) -> None:
        """A node failed in the middle of a session, or refused one."""
        self._count(node, 1.0)

    def save(self) -> None:
        """Write the file, with what other processes have learned of other nodes meanwhile. Blocking."""
        if self._path is None:
            return
        self._beliefs = newer(self._beliefs, _read(self._path))
        self._forget_some()
        kept = {node: asdict(belief) for node, belief in self._beliefs.items()}
        write(self._path, VERSION, {"nodes": kept}, "nodes")

    def _now(self, node: Address, claim: float) -> Belief:
        """The belief about a node as time has left it, and as what it says today changes it."""
        known = self._beliefs.get(node)
        if known is None:
            return Belief(claim, claim, 1.0, 0.0, 0.0, self._clock())
        kept = 0.5 ** (max(self._clock() - known.at, 0.0) / HALF_LIFE_S)
        measured = known.layer_s + max(claim - known.claim, 0.0)
        if claim < known.claim and known.layer_s <= HONEST * known.claim:
            measured = known.layer_s * claim / known.claim
        return Belief(
            claim + (measured - claim) * kept if known.doubt < 1 else claim,
            claim,
            1.0 - (1.0 - known.doubt) * kept,
            known.failures * kept,
            known.sessions * kept,
            self._clock(),
        )

    def _count(self, node: Address, failures: float) -> None:
        known = self._beliefs.get(node)
        belief = self._now(node, known.claim if known else per_layer(Expected(), 1))
        self._beliefs[node] = replace(belief, failures=belief.failures + failures, sessions=belief.sessions + 1)
        self._forget_some()

    def _forget_some(self) -> None:
        self._beliefs = latest(self._beliefs, MAX_NODES)


def per_layer(expected: Expected, num_layers: int) -> float:
    """Seconds per layer, waiting included, of a span of so many layers."""
    return bounded(expected.layer_s) + bounded(expected.wait_s) / max(num_layers, 1)


def claim_of(hop: Candidate) -> float:
    """What a hop says that a layer takes, over the span that it serves."""
    return per_layer(hop.claimed, len(hop.span))


def _told_apart(
    hops: Sequence[Candidate], beliefs: Sequence[Belief], seconds: float, noise: float, deviation_s: float
) -> list[Belief]:
    """Beliefs after hops took so many seconds together: x_i += K_i r, K_i = V_i / (sum V + R) (Kalman 1960).

    Nobody is taken to be much faster than it says: who would be stays there, and the others explain the rest.
    """
    layers, seconds = [len(hop.span) for hop in hops], bounded(seconds)
    least = [min(belief.layer_s, belief.claim * MODESTY) for belief in beliefs]
    scale = max(seconds, 1e-9)
    unsure = (noise * scale) ** 2 + bounded(deviation_s) ** 2
    told, free = list(beliefs), list(range(len(hops)))
    while free:
        residual = seconds - sum(count * belief.layer_s for count, belief in zip(layers, told, strict=True))
        spread = {i: beliefs[i].doubt * (layers[i] / sum(layers) * scale) ** 2 for i in free}
        total = sum(spread.values()) + unsure
        moved = {i: beliefs[i].layer_s + own / total * residual / layers[i] for i, own in spread.items()}
        fixed = [i for i in free if moved[i] < least[i]]
        if not fixed:
            for i, own in spread.items():
                doubt = max(beliefs[i].doubt * (1 - own / total), LEAST_DOUBT)
                told[i] = replace(beliefs[i], layer_s=min(moved[i], LONGEST_S), doubt=doubt)
            break
        for i in fixed:
            told[i] = replace(beliefs[i], layer_s=least[i])
        free = [i for i in free if i not in fixed]
    return told


def _read(path: Path | None) -> dict[Address, Belief]:
    """The beliefs in a file, as far as they are sound."""
    nothing: dict[Address, Belief] = {}
    found = read(path, VERSION, _from_json, nothing, "nodes")
    return {node: belief for node, belief in found.items() if _is_sound(belief)}


def _from_json(body: Any) -> dict[Address, Belief]:
    return {Address(str(node)): Belief(**values) for node, values in body["nodes"].items()}


def _is_sound(belief: Belief) -> bool:
    values = list(asdict(belief).values())
    numbers = all(type(value) in (int, float) and math.isfinite(value) and value >= 0 for value in values)
    return numbers and belief.doubt <= 1 and belief.layer_s <= LONGEST_S
