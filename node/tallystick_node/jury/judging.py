"""From what a recomputation found to a vote: rulings 22 to 24, as pure functions."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from tallystick_protocol.chain.court import Vote

GROSS = 30.0
"""Times `guilty`: the least error that a juror of another class calls one."""

SPREAD = 0.25
"""Of the error: more than that between a juror's own two kernels, and it says nothing about another class."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a juror found, by itself.

    problem: "" when it could compute, "unreadable" when the evidence cannot be, "unable" when this juror cannot.
    same_class: whether the accused's class is this machine's. root: over the juror's own output rows. error: of the
    accused's rows, inf where they are not finite; None where the evidence has none. spread: the error between the
    juror's own two kernels, where that was needed.
    """

    problem: str = ""
    why: str = ""
    same_class: bool = False
    equal: bool = False
    root: str = "00" * 32
    error: float | None = None
    clear: float = 0.0
    guilty: float = 0.0
    spread: float | None = None
    seconds: float = 0.0

    def to_json(self) -> str:
        return json.dumps({name: _told(value) for name, value in asdict(self).items()})

    @staticmethod
    def from_json(text: str) -> Finding:
        value: dict[str, Any] = json.loads(text)
        for name in ("error", "spread"):
            value[name] = None if value[name] is None else float(value[name])
        return Finding(**value)


def judge(finding: Finding) -> Vote:
    """The vote that follows; there is no discretion in it."""
    if finding.problem:
        return Vote.UNREADABLE if finding.problem == "unreadable" else Vote.ABSTAIN
    error = finding.error
    if finding.same_class:
        if finding.equal:
            return Vote.CLEAR
        # Without output rows nobody can measure the error. Whoever accuses could leave them out: so it is a fault,
        # and the second one in 30 days is a conviction.
        return Vote.FAULT if error is None or error <= finding.guilty else Vote.GUILTY
    if error is None:
        return Vote.ABSTAIN
    if error < finding.clear:
        return Vote.CLEAR
    if error > GROSS * finding.guilty and finding.spread is not None and finding.spread <= SPREAD * error:
        return Vote.GUILTY
    return Vote.ABSTAIN


def needs_spread(finding: Finding) -> bool:
    """Whether the juror's second kernel has a say."""
    return not finding.same_class and finding.error is not None and finding.error > GROSS * finding.guilty


def _told(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
