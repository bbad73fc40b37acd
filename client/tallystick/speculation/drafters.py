"""Who drafts: anything that proposes what may come next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from tallystick_protocol.sampling import Sampling


class Drafter(Protocol):
    """Proposes tokens. What it proposes changes how fast an answer comes, never the answer.

    One drafter serves one answer at a time. It is called in a thread of its own.
    """

    def propose(self, ids: Sequence[int], k: int) -> list[int]:
        """At most k tokens that may follow `ids`, the prompt and the answer so far; fewer, or none, where unsure."""
        ...


@runtime_checkable
class Coupling(Protocol):
    """A drafter that can choose with the answer's own noise."""

    def coupled(self, sampling: Sampling) -> Drafter:
        """A drafter for one answer that draws as the answer does: where the two models agree, so do their tokens."""
        ...
