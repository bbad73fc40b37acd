"""Pairs of nodes of different classes that keep disagreeing a little: remembered by one client over its sessions.

A pair that disagrees for good says that one of the two computes something else, not which. Who so disagrees with nodes
of two other operators, over the same layers, is avoided. That is the client's own opinion, and never a conviction.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tallystick.routing.remembered import latest, newer, read, write
from tallystick_protocol.sketching.accumulating import BETS, Capital
from tallystick_protocol.types import Address, Digest, ModelId, Span

VERSION = 2
MAX_PAIRS = 10_000
MAX_SEEN = 8_192
FORGOTTEN_AFTER_S = 30 * 86_400.0
"""After the last window of a pair: machines are repaired."""
WITNESSES = 2


@dataclass(frozen=True, slots=True)
class Side:
    """One of two nodes that computed the same rows. Its class is left out: who says another one does not begin anew."""

    node: Address
    operator: Address


@dataclass(frozen=True, slots=True)
class Pair:
    """A hop and the auditor of another class that recomputed it. model: the model's id in hex."""

    model: str
    span: Span
    hop: Side
    auditor: Side


@dataclass(frozen=True, slots=True)
class Record:
    """at: unix seconds of the last window."""

    capital: Capital
    at: float


class Suspicions:
    """What is remembered of pairs, kept in a file if one is given.

    The same rows count once for a pair: who repeats a prompt that happens to lie badly learns nothing new by it.
    """

    def __init__(self, path: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        """path: read if it is there; what cannot be read is started anew."""
        self._path, self._clock = path, clock
        self._records, self._seen = _read(path)

    def __len__(self) -> int:
        return len(self._records)

    def note(self, pair: Pair, rows: Digest, scores: Sequence[float]) -> Capital:
        """One more window of a pair; returns what there is against it now. rows: the root over what entered it."""
        window = _window(pair, rows)
        if window in self._seen:
            return self.of(pair)
        self._seen[window] = None
        while len(self._seen) > MAX_SEEN:
            del self._seen[next(iter(self._seen))]
        capital = self.of(pair).after(scores)
        self._records[pair] = Record(capital, self._clock())
        self._records = latest(self._records, MAX_PAIRS)
        return capital

    def of(self, pair: Pair) -> Capital:
        """What there is against a pair."""
        record = self._records.get(pair)
        return Capital() if record is None or self._is_old(record) else record.capital

    def is_suspect(self, model: ModelId, node: Address, span: Span) -> bool:
        """Whether a node should be audited more often: some pair of it leans towards a disagreement."""
        return any(
            (pair.span, pair.hop.node) == (span, node) and capital.is_suspect for pair, capital in self._of_model(model)
        )

    def avoided(self, model: ModelId) -> set[Address]:
        """Nodes that disagree for good with nodes of WITNESSES other operators over the same layers of a model. Not of
        others: a manifest may say that errors must be less than honest ones are, and who writes one is anybody.

        Who disagrees with most is named first, and its pairs count against nobody else then: else each honest node
        would be one of two whom two cheaters contradict. Where the numbers are equal nobody is named.
        """
        spans: dict[Span, list[tuple[Side, Side]]] = {}
        for pair, capital in self._of_model(model):
            if capital.is_conclusive and pair.hop.operator != pair.auditor.operator:
                spans.setdefault(pair.span, []).append((pair.hop, pair.auditor))
        return {node for pairs in spans.values() for node in _named(pairs)}

    def save(self) -> None:
        """Write the file, with what other processes have learned of other pairs meanwhile. Blocking."""
        if self._path is None:
            return
        records, seen = _read(self._path)
        self._seen = dict(list((seen | self._seen).items())[-MAX_SEEN:])
        self._records = newer(self._records, records)
        kept = [_to_json(pair, record) for pair, record in self._records.items() if not self._is_old(record)]
        write(self._path, VERSION, {"pairs": kept, "seen": list(self._seen)}, "pairs")

    def _of_model(self, model: ModelId) -> Iterator[tuple[Pair, Capital]]:
        for pair, record in self._records.items():
            if pair.model == model.hex() and not self._is_old(record):
                yield pair, record.capital

    def _is_old(self, record: Record) -> bool:
        return self._clock() - record.at > FORGOTTEN_AFTER_S


def _named(pairs: list[tuple[Side, Side]]) -> set[Address]:
    """Of the pairs over one span that disagree, whom the others point at."""
    found: set[Address] = set()
    while True:
        against: dict[Address, set[Address]] = {}
        for one, other in pairs:
            against.setdefault(one.node, set()).add(other.operator)
            against.setdefault(other.node, set()).add(one.operator)
        most = max(map(len, against.values()), default=0)
        top = {node for node, operators in against.items() if len(operators) == most}
        if most < WITNESSES or any(one.node in top and other.node in top for one, other in pairs):
            return found
        found |= top
        pairs = [(one, other) for one, other in pairs if one.node not in top and other.node not in top]


def _to_json(pair: Pair, record: Record) -> dict[str, Any]:
    sides = [[side.node, side.operator] for side in (pair.hop, pair.auditor)]
    return {
        "model": pair.model,
        "span": [pair.span.start, pair.span.end],
        "sides": sides,
        "windows": record.capital.windows,
        "bets": list(record.capital.bets),
        "at": record.at,
    }


def _window(pair: Pair, rows: Digest) -> str:
    """What stands for one window of a pair among those that were seen."""
    text = f"{pair.model} {pair.span} {pair.hop.node} {pair.auditor.node} {rows.hex()}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(path: Path | None) -> tuple[dict[Pair, Record], dict[str, None]]:
    """The pairs in a file and the windows that were seen."""
    nothing: tuple[dict[Pair, Record], dict[str, None]] = {}, {}
    return read(path, VERSION, _remembered, nothing, "pairs")


def _remembered(body: Any) -> tuple[dict[Pair, Record], dict[str, None]]:
    return dict(map(_from_json, body["pairs"])), dict.fromkeys(map(str, body["seen"][-MAX_SEEN:]))


def _from_json(value: dict[str, Any]) -> tuple[Pair, Record]:
    hop, auditor = (Side(Address(str(node)), Address(str(operator))) for node, operator in value["sides"])
    bets = tuple(float(one) for one in value["bets"])
    windows, at = int(value["windows"]), float(value["at"])
    sound = len(bets) == len(BETS) and all(math.isfinite(one) and one >= 0 for one in (*bets, at))
    if not sound or windows < 0:
        raise ValueError("a pair that does not add up")
    pair = Pair(str(value["model"]), Span(int(value["span"][0]), int(value["span"][1])), hop, auditor)
    return pair, Record(Capital(windows, bets), at)
