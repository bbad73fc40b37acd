"""How many tokens to draft: from how often drafts are right and how long passes take. Pure; knows no clock.

A pass over the last token and k drafts gives 1 + a + … + a^k tokens, when a draft is right with probability a as long
as those before it were (Leviathan et al., https://arxiv.org/abs/2211.17192, equation 1), and takes t + k c seconds, t
for a plain pass and c for each further row, drafting included.
"""

from __future__ import annotations

from dataclasses import dataclass

MEMORY = 0.8
"""What an observation still counts after the next one."""

PRIOR = 1.0
"""Drafts that are taken for right, and for wrong, before any was seen."""

LONGEST_RUN = 8
"""A longer run of right drafts counts as one of so many: what goes on for long must not take long to be forgotten."""

ROW_SHARE = 0.1
"""A further row's time as a share of a plain pass, before it was measured."""

OUTLIER = 3.0
"""A pass that takes so many times what was expected, a failover perhaps, counts as if it took that."""

FASTER = 0.8
"""A pass is only taken for faster than before when it took less than this share of the time."""

FADING = 0.03
"""What a plain pass takes off a row's time that is above the usual one."""


@dataclass(frozen=True, slots=True)
class Limits:
    """most: drafts in one pass; a node takes more than 16 rows for part of a prompt. chance: a draft is sent that is
    right with at least this probability: it is paid for in any case. gain: tokens a second against plain decoding
    that make it worth while. loss: the share of the time that wrong drafts may cost, and `slack` plain passes besides.
    """

    most: int = 15
    chance: float = 0.5
    gain: float = 1.1
    loss: float = 0.03
    slack: float = 0.5


class Pace:
    """The controller of one answer."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._right = self._wrong = PRIOR
        self._plain_s = 0.0
        self._row_s = 0.0
        self._rows_measured = False
        self._elapsed_s = 0.0
        self._lost_s = 0.0

    @property
    def acceptance(self) -> float:
        """The estimated probability that a draft is right when those before it were."""
        return self._right / (self._right + self._wrong)

    @property
    def lost_s(self) -> float:
        """Seconds that passes with drafts have taken beyond what their tokens take plainly; not below 0."""
        return self._lost_s

    def drafts(self, room: int) -> int:
        """How many tokens to draft for the next pass, at most `room`; 0 for a plain pass."""
        if self._plain_s == 0.0:
            return 0  # nothing to compare with yet
        a, best, best_gain = self.acceptance, 0, self._limits.gain
        tokens = chance = 1.0
        for k in range(1, min(room, self._limits.most) + 1):
            chance *= a
            tokens += chance
            gain = tokens * self._plain_s / (self._plain_s + k * self._row_s)
            if chance < self._limits.chance or not self._affords(k * self._row_s):
                break
            if gain > best_gain:
                best, best_gain = k, gain
        return best

    def may_look(self, seconds: float) -> bool:
        """Whether a draft that is only compared with what comes, and not sent, is worth so many seconds."""
        return self._affords(seconds)

    def looked(self, right: bool, seconds: float) -> None:
        """A draft of one token was compared with what came, and not sent."""
        self._learn(int(right), int(not right))
        self._lost_s += seconds

    def passed(self, drafted: int, accepted: int, seconds: float | None) -> None:
        """A pass has ended. drafted, accepted: of its tokens; seconds: what it took, with the drafting, if known."""
        if drafted:
            self._learn(accepted, int(accepted < drafted))
        if seconds is None:
            return
        expected = self._plain_s + drafted * self._row_s
        if expected:
            seconds = min(seconds, OUTLIER * expected)
        self._elapsed_s += seconds
        if not drafted:
            self._plain_s = _towards(self._plain_s, seconds)
            usual_s = ROW_SHARE * self._plain_s
            if self._rows_measured:  # what was once dear, by chance perhaps, is tried again some time
                self._row_s -= FADING * max(0.0, self._row_s - usual_s)
            else:
                self._row_s = usual_s
            return
        if seconds < FASTER * self._plain_s:  # more rows are no faster than one: the plain pass has become so, too
            self._plain_s = _towards(self._plain_s, seconds)
        row_s = max(0.0, seconds - self._plain_s) / drafted
        self._row_s = _towards(self._row_s, row_s) if self._rows_measured else row_s
        self._rows_measured = True
        self._lost_s = max(0.0, self._lost_s + seconds - (accepted + 1) * self._plain_s)

    def _affords(self, seconds: float) -> bool:
        allowed = self._limits.loss * self._elapsed_s + self._limits.slack * self._plain_s
        return self._lost_s + seconds <= allowed

    def _learn(self, right: int, wrong: int) -> None:
        self._right = MEMORY * self._right + (1 - MEMORY) * PRIOR + min(right, LONGEST_RUN)
        self._wrong = MEMORY * self._wrong + (1 - MEMORY) * PRIOR + wrong


def _towards(old: float, new: float) -> float:
    return new if old == 0.0 else 0.7 * old + 0.3 * new
