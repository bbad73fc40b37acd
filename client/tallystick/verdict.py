"""What was checked about an answer, by whom and how, and what was paid: how far to trust it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from tallystick.attribution import Attribution
from tallystick_protocol.types import Address, Positions, Span, Wei

Policy = Literal["off", "audit", "full", "agree=2", "agree=3", "agree=4"]
POLICIES: tuple[str, ...] = get_args(Policy)


def num_routes(policy: str) -> int:
    """How many routes a policy takes side by side."""
    return int(policy.removeprefix("agree=")) if policy.startswith("agree=") else 1


@dataclass(frozen=True, slots=True)
class Check:
    """One window of one span that two have computed. passed: None when nobody could say who was wrong.

    how: "hash" within a class, "sketch" across classes, "routes" where the second one carried another route of
    `agree=k`, "tolerance" in tuning. error: how far apart the two were, of `tolerance`, up to which it passes; 0 for
    hashes. Between routes that are cut elsewhere the span is that between two boundaries that they share, and the nodes
    are those that end it.
    """

    span: Span
    positions: Positions
    node: Address
    auditor: Address
    passed: bool | None
    how: str = "hash"
    error: float = 0.0
    tolerance: float = 0.0


@dataclass(frozen=True, slots=True)
class Accusation:
    """A node whose work two others contradict, alike. evidence: the CID of what the Court needs, "" for none: passes
    are not signed."""

    node: Address
    span: Span
    positions: Positions
    witnesses: tuple[Address, ...]
    evidence: str = ""


@dataclass(slots=True)
class Verdict:
    """The verdict on one answer (docs/verification.md says what each field means).

    worst_error and tolerance: of the check across classes that came nearest to failing; 0 without any: within a class,
    results are equal or wrong. moved: nodes that were replaced by one of another class, whose bits are others.

    attributions: one for each node that failed and each disagreement, in the order in which they were found.
    unverifiable: the hops that have no numeric class (setting `admit_stock`): nothing of what they did was checked.
    unaudited: hops that were drawn for an audit under `audit`, and nobody could recompute them.
    unproven: hops of a numeric class in which this client has not yet seen two operators agree bit for bit.
    not_slashable: positions, the last ones, that evidence cannot hold: audited and withheld as all others, but no case
    can be made of them.
    """

    policy: Policy
    receipts: int = 0
    checks: list[Check] = field(default_factory=list)
    accusations: list[Accusation] = field(default_factory=list)
    attributions: list[Attribution] = field(default_factory=list)
    replaced: list[tuple[Address, Address, str]] = field(default_factory=list)
    paid: dict[Address, Wei] = field(default_factory=dict)
    withheld: dict[Address, Wei] = field(default_factory=dict)
    unverifiable: list[tuple[Address, Span]] = field(default_factory=list)
    unaudited: list[tuple[Address, Span]] = field(default_factory=list)
    unproven: list[tuple[Address, Span]] = field(default_factory=list)
    not_slashable: int = 0
    moved: list[Address] = field(default_factory=list)
    worst_error: float = 0.0
    tolerance: float = 0.0

    def note(self, check: Check) -> None:
        """Add a check."""
        self.checks.append(check)
        self.came_near(check.error, check.tolerance)

    def came_near(self, error: float, tolerance: float) -> None:
        """Remember an error, if it is the one that came nearest to failing; a tolerance of 0 is none."""
        if tolerance and error * self.tolerance >= self.worst_error * tolerance:
            self.worst_error, self.tolerance = error, tolerance

    @property
    def checked(self) -> int:
        """Windows of spans that two nodes at least have computed: `passed` and `failed` together."""
        return len(self.checks)

    @property
    def nodes(self) -> list[Address]:
        """Those whose work was compared with somebody else's: the computing ones and the recomputing ones."""
        return sorted({node for check in self.checks for node in (check.node, check.auditor)})

    @property
    def passed(self) -> int:
        return sum(check.passed is True for check in self.checks)

    @property
    def failed(self) -> int:
        return sum(check.passed is not True for check in self.checks)

    @property
    def is_undecided(self) -> bool:
        """Whether two disagreed and nobody could say who was wrong."""
        return any(check.passed is None for check in self.checks)

    @property
    def spans(self) -> list[Span]:
        """The spans of which at least one window was checked."""
        return sorted({check.span for check in self.checks})

    @property
    def exact(self) -> bool:
        """Whether failovers changed no bit: False when a node without a class was replaced by another one, or one by a
        node of another class."""
        without_class = {node for node, _ in self.unverifiable}
        return not self.moved and not any(lost in without_class for lost, _, _ in self.replaced)

    def to_json(self) -> dict[str, Any]:
        """The verdict as plain values. Amounts are token base units, in all and (`*_by_node`) per node."""
        return {
            "policy": self.policy,
            "checked": self.checked,
            "passed": self.passed,
            "failed": self.failed,
            "spans": [_layers(span) for span in self.spans],
            "nodes": self.nodes,
            "worst_error": self.worst_error,
            "tolerance": self.tolerance,
            "paid": sum(self.paid.values()),
            "withheld": sum(self.withheld.values()),
            "paid_by_node": _amounts(self.paid),
            "withheld_by_node": _amounts(self.withheld),
            "receipts": self.receipts,
            "accusations": [
                {
                    "node": one.node, "layers": _layers(one.span),
                    "positions": [one.positions.first, one.positions.last], "witnesses": list(one.witnesses),
                    "evidence": one.evidence,
                }
                for one in self.accusations
            ],
            "attributions": [one.to_json() for one in self.attributions],
            "replaced": [{"lost": old, "by": new, "why": why} for old, new, why in self.replaced],
            "unverifiable": [{"node": node, "layers": _layers(span)} for node, span in self.unverifiable],
            "unaudited": [{"node": node, "layers": _layers(span)} for node, span in self.unaudited],
            "unproven": [{"node": node, "layers": _layers(span)} for node, span in self.unproven],
            "not_slashable": self.not_slashable,
            "moved": list(self.moved),
            "exact": self.exact,
        }  # fmt: skip


def _layers(span: Span) -> list[int]:
    return [span.start, span.end]


def _amounts(book: Mapping[Address, Wei]) -> dict[str, int]:
    return {node: int(amount) for node, amount in sorted(book.items())}
