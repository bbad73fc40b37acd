"""What `tallystick-node plan` shows: layers, coverage, candidates and the choice, as a table or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tallystick_node.planning.choice import Candidate, Machine
from tallystick_node.planning.supply import Supply, coverage, missing, throughput
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.types import Span

SHOWN = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """A choice, the node's or the settings', and what it rests on. why: a sentence; choice: None when nothing fits."""

    manifest: Manifest
    machine: Machine
    supply: Supply
    num_servers: int
    ranked: Sequence[Candidate]
    choice: Span | None
    why: str

    def to_json(self) -> dict[str, Any]:
        covered = coverage(self.supply, self.manifest.layers)
        return {
            "model": self.manifest.name,
            "layers": [
                {"layer": index, "rows_per_s": round(rate, 3), "bytes": size, "row_s": seconds}
                for index, (rate, size, seconds) in enumerate(
                    zip(covered, self.machine.layer_bytes, self.machine.row_s, strict=True)
                )
            ],
            "memory_bytes": self.machine.memory_bytes,
            "servers": self.num_servers,
            "missing_layers": missing(self.supply, self.manifest.layers),
            "throughput": throughput(self.supply, self.manifest.layers),
            "candidates": [
                {
                    "span": f"{one.span.start}:{one.span.end}",
                    "rows_per_s": round(one.rate, 3),
                    "fills": one.fills,
                    "joined": one.joined,
                    "gain": round(one.gain, 6),
                }
                for one in self.ranked
            ],
            "choice": None if self.choice is None else f"{self.choice.start}:{self.choice.end}",
            "why": self.why,
        }

    def to_lines(self) -> list[str]:
        layers = self.manifest.layers
        covered = coverage(self.supply, layers)
        lines = [f"{self.manifest.name}: {layers} layers, {self.num_servers} other nodes serve it"]
        lines += [f"{'layer':>7}  {'rows/s':>9}  {'MB':>8}  {'ms/row':>8}"]
        for index, (rate, size) in enumerate(zip(covered, self.machine.layer_bytes, strict=True)):
            seconds = self.machine.row_s[index] * 1e3
            lines.append(f"{index:>7}  {rate:>9.1f}  {size / 1e6:>8.1f}  {seconds:>8.3f}")
        lines.append(f"memory for weights here: {self.machine.memory_bytes / 1e6:,.0f} MB")
        lines.append(f"{'span':>9}  {'rows/s':>9}  {'fills':>5}  {'joined':>6}  {'gain':>9}")
        for one in self.ranked[:SHOWN]:
            name = f"{one.span.start}:{one.span.end}"
            lines.append(
                f"{name:>9}  {one.rate:>9.1f}  {one.fills:>5}  {'yes' if one.joined else 'no':>6}  {one.gain:>9.3f}"
            )
        chosen = "none" if self.choice is None else f"{self.choice.start}:{self.choice.end}"
        lines.append(f"choice: {chosen}; {self.why}")
        return lines


def why_of(ranked: Sequence[Candidate], choice: Candidate | None, manifest: Manifest, machine: Machine) -> str:
    """The reason for a choice, for a person."""
    if choice is None:
        smallest = min(machine.layer_bytes)
        return (
            f"no layer fits: the smallest takes {smallest / 1e6:,.0f} MB, {machine.memory_bytes / 1e6:,.0f} MB are left"
            " for weights; raise memory or lower cache_bytes"
        )
    if choice.fills:
        return f"it fills {choice.fills} layers that nobody serves, the most that fit"
    return f"it lifts the network's soft bottleneck most: {choice.gain:.2f}, of {choice.rate:.1f} rows/s that it offers"


def why_told(told: Candidate, ranked: Sequence[Candidate], machine: Machine) -> str:
    """What a span that the settings name would bring, and what the node would take by itself."""
    words = [f"the settings say so; it offers {told.rate:.1f} rows/s"]
    if told.fills:
        words.append(f"and fills {told.fills} layers that nobody serves")
    else:
        words.append(f"and lifts the network's soft bottleneck by {told.gain:.2f}")
    if not told.joined:
        words.append("(no route passes through it until others come)")
    if not machine.fits(told.span):
        size = sum(machine.layer_bytes[told.span.start : told.span.end]) / 1e6
        words.append(f"but takes {size:,.0f} MB of memory, {machine.memory_bytes / 1e6:,.0f} MB are left for weights")
    return f"{' '.join(words)}; {_auto(told.span, [one.span for one in ranked])}"


def _auto(told: Span, best_first: Sequence[Span]) -> str:
    if not best_first:
        return "auto would find no layer that fits"
    best = best_first[0]
    return "auto would take it, too" if best == told else f"auto would take {best.start}:{best.end}"
