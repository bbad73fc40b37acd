"""What sessions may take together: places, and bytes of caches and kept rows on each device.

What a session may need at most is reserved when it opens, so that none is stopped halfway for want of memory: whoever
is in the middle of an answer would have to be moved to another node, and every row be computed and paid again. Clients
open sessions for as many positions as they are going to use, so little of it stays unused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch

from tallystick_model.canonical.cache import ROWS
from tallystick_model.canonical.tiles import R
from tallystick_model.devices import CPU
from tallystick_model.span import SpanModel
from tallystick_protocol.errors import Overloaded
from tallystick_protocol.sketching.rows import ROW_BYTES
from tallystick_protocol.types import Address, SessionId

PAYER_SHARE = 0.75
"""Of places and bytes, for the sessions of one payer: who has one already leaves the rest to others."""

RECORD_BYTES = 200
"""Of a kept row, besides its values: two digests of 32 bytes, three objects' heads, four places in lists."""


SKETCH_BYTES = 100
"""Of a position where sketches are in use, besides its values: an object's head, a number, two places in lists."""


class Admission:
    """The budget of one node, which every device has for itself."""

    def __init__(
        self,
        model: SpanModel,
        budget: int,
        max_sessions: int,
        retry_after_s: Callable[[], int],
        evict: Callable[[], bool] = lambda: False,
    ) -> None:
        """budget: bytes on each device; those of kept rows are the CPU's. retry_after_s: for whoever is refused.

        evict: gives up something that is kept without being needed, through `close`; False when there is nothing.
        """
        self._model = model
        self._budget = budget
        self._max_sessions = max_sessions
        self._retry_after_s = retry_after_s
        self._evict = evict
        self._taken: dict[SessionId, Counter[torch.device]] = {}
        self._total: Counter[torch.device] = Counter()
        self._spare: set[SessionId] = set()
        self._payers: dict[SessionId, Address] = {}

    @property
    def reserved_bytes(self) -> int:
        """Of open sessions, on all devices."""
        return self._total.total() - self.kept_bytes

    @property
    def kept_bytes(self) -> int:
        """Of sessions that have ended, whose rows are kept; they go when room is needed."""
        return sum(self._taken[session].total() for session in self._spare)

    @property
    def usage(self) -> float:
        """The share of the budget that is reserved or kept, on the device where it is largest."""
        return max(self._total.values(), default=0) / self._budget

    def open(
        self, session: SessionId, payer: Address, max_length: int, num_open: int, model: SpanModel | None = None
    ) -> None:
        """Reserve what a session of so many positions may take. num_open: the sessions that there are.

        model: the part of the node's that the session is over; None for all.
        Raises Overloaded when there is no place, no room on some device, or the payer has its share.
        """
        if num_open >= self._max_sessions:
            raise self._full("no place for another session now")
        needed = session_bytes(model or self._model, max_length)
        self._leave_room_for_others(payer, needed)
        self._reserve(session, needed, "no room for another session now")
        self._payers[session] = payer

    def take_more(self, session: SessionId, num_bytes: int) -> None:
        """Reserve more of the CPU's memory for an open session. Raises Overloaded."""
        self._reserve(session, Counter({CPU: num_bytes}), "no room for more in this session now")

    def spare(self, session: SessionId) -> None:
        """A session has ended, but what it holds is kept for now; `evict` may let it go."""
        self._spare.add(session)

    def close(self, session: SessionId) -> None:
        """Free what a session has reserved, if anything."""
        self._total -= self._taken.pop(session, Counter())
        self._spare.discard(session)
        self._payers.pop(session, None)

    def _leave_room_for_others(self, payer: Address, needed: Counter[torch.device]) -> None:
        held = [session for session, owner in self._payers.items() if owner == payer and session not in self._spare]
        if not held:
            return
        together = sum((self._taken[session] for session in held), needed)
        if len(held) >= PAYER_SHARE * self._max_sessions or max(together.values()) > PAYER_SHARE * self._budget:
            raise self._full("the sessions that you have here leave no more than others may need")

    def _reserve(self, session: SessionId, needed: Counter[torch.device], refusal: str) -> None:
        while any(self._total[device] + count > self._budget for device, count in needed.items()):
            if any(count > self._budget for count in needed.values()) or not self._evict():
                raise self._full(refusal)
        self._taken.setdefault(session, Counter()).update(needed)
        self._total.update(needed)

    def _full(self, refusal: str) -> Overloaded:
        return Overloaded(refusal, retry_after_s=self._retry_after_s())


def session_bytes(model: SpanModel, max_length: int) -> Counter[torch.device]:
    """What the cache and the kept rows of a session of so many positions take on each device, at most."""
    needed = Counter({CPU: max_length * (4 * model.manifest.width + RECORD_BYTES)})
    if model.causal:
        rows = -(-(max_length + R - 1) // ROWS) * ROWS  # as `KvCache.reserve` rounds
        for layer in range(model.span.start, model.span.end):
            needed[model.placement.of_layer(layer)] += rows * _layer_row_bytes(model, layer)
    return needed


def sketch_bytes(model: SpanModel, max_length: int) -> int:
    """What a session of so many positions keeps besides where sketches are in use: what came in, and the answers."""
    entered = 4 if model.is_first else 4 * model.manifest.width
    return max_length * (entered + ROW_BYTES + SKETCH_BYTES)


def row_bytes(model: SpanModel) -> int:
    """Cache bytes that one position of a session takes."""
    return sum(_layer_row_bytes(model, layer) for layer in range(model.span.start, model.span.end))


def _layer_row_bytes(model: SpanModel, layer: int) -> int:
    """fp32. Keys and values of which no shape is known are taken to be as wide as hidden rows."""
    shape = model.cache_shapes.get(layer)
    if not model.causal:
        return 0
    return 8 * model.manifest.width if shape is None else shape.row_bytes
