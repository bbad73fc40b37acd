"""What was checked about an answer, by whom and how, and what was paid: how far to trust it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tallystick_protocol.types import Address, Positions, Span, Wei

Policy = Literal["off", "audit", "full"]


@dataclass(frozen=True, slots=True)
class Check:
    """One window of one span, recomputed elsewhere. passed: None when nobody could say who was wrong.

    how: "hash" within a class, "sketch" across classes, "tolerance" in tuning. error: how far apart the two were, of
    `tolerance`, up to which it passes; both 0 for hashes.
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
    """A node whose signed work two others contradict, alike. evidence: the CID of what the Court needs, "" for none."""

    node: Address
    span: Span
    positions: Positions
    witnesses: tuple[Address, ...]
    evidence: str = ""


@dataclass(slots=True)
class Verdict:
    """The verdict on one answer. worst_error and tolerance: of the check across classes that came nearest to failing;
    0 without any: within a class, results are equal or wrong.

    moved: nodes that were replaced by one of another class, whose bits are others.

    unverifiable: the hops that have no numeric class (setting `admit_stock`): nothing of what they did was checked.
    """

    policy: Policy
    receipts: int = 0
    checks: list[Check] = field(default_factory=list)
    accusations: list[Accusation] = field(default_factory=list)
    replaced: list[tuple[Address, Address, str]] = field(default_factory=list)
    paid: dict[Address, Wei] = field(default_factory=dict)
    withheld: dict[Address, Wei] = field(default_factory=dict)
    unverifiable: list[tuple[Address, Span]] = field(default_factory=list)
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
    def passed(self) -> int:
        return sum(check.passed is True for check in self.checks)

    @property
    def failed(self) -> int:
        return sum(check.passed is not True for check in self.checks)

    @property
    def spans(self) -> list[Span]:
        """The spans of which every window was checked at least once, or some were."""
        return sorted({check.span for check in self.checks})

    @property
    def exact(self) -> bool:
        """Whether failovers changed no bit: False when a node without a class was replaced by another one, or one by a
        node of another class."""
        without_class = {node for node, _ in self.unverifiable}
        return not self.moved and not any(lost in without_class for lost, _, _ in self.replaced)
