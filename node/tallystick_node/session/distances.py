"""How far away the nodes are that this one has dialled: told to clients, who plan routes."""

from __future__ import annotations

from tallystick_protocol.types import ZERO32, Address, Digest

MAX_NODES = 64
"""The last ones that were dialled."""

PLAIN, ENCRYPTED = 2, 3
"""Round trips until a WebSocket is open: TCP, perhaps TLS 1.3, and the upgrade."""


class Distances:
    """Round trips, the shortest that was seen of each node, forgotten slowly. Of the last nodes only."""

    def __init__(self) -> None:
        self._rtts: dict[Address, float] = {}

    def note(self, node: Address, seconds: float, spki: Digest) -> None:
        """Opening a connection took so long; spki: of the key that was shown, zero for a plain socket."""
        rtt_s = seconds / (PLAIN if spki == ZERO32 else ENCRYPTED)
        before = self._rtts.pop(node, rtt_s)
        self._rtts[node] = min(rtt_s, before + (rtt_s - before) / 8)
        while len(self._rtts) > MAX_NODES:
            del self._rtts[next(iter(self._rtts))]

    def told(self) -> dict[str, float]:
        """Milliseconds there and back, by node."""
        return {node: round(rtt_s * 1e3, 2) for node, rtt_s in self._rtts.items()}
