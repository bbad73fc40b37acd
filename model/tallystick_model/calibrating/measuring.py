"""How far apart nodes of different classes are, span by span: every pair of honest ones, and cheaters against each."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tallystick_model.calibrating.cheaters import CHEATERS, fitting
from tallystick_model.calibrating.machines import CLASSES, HERE, STOCK, Kind, Machine
from tallystick_protocol.errors import ConfigError
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.sketching.logits import compare
from tallystick_protocol.sketching.matrix import CHALLENGE_BYTES
from tallystick_protocol.sketching.rows import Sketches, sketch
from tallystick_protocol.sketching.statistic import errors
from tallystick_protocol.types import WINDOW, Positions, Span

CHALLENGES = 2
"""For each window: what they say of it differs by a seventh at most."""

TOP_K = 64
Errors = Any
"""Of windows, (texts, windows times challenges, 2) float64: the root mean square over rows, and `statistic.quiet`."""


@dataclass(slots=True)
class Measured:
    """Errors of one span's windows, each under so many challenges. honest: by pair of classes; stock: of stock kernels
    against each class.

    cheaters: by name, against each class but the cheater's own.
    """

    span: Span
    challenges: int = 1
    honest: dict[str, Errors] = field(default_factory=dict)
    stock: dict[str, Errors] = field(default_factory=dict)
    cheaters: dict[str, Errors] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure. ids: (texts, positions) int64, or None for what the model itself writes."""

    manifest: Manifest
    pieces: Path
    spans: Sequence[Span]
    ids: Any
    texts: int
    positions: int
    seed: int = 0
    devices: Sequence[str] = ()


def spans_of(manifest: Manifest, lengths: Sequence[int]) -> list[Span]:
    """Every span of so many layers, in order. Raises ConfigError for a model that is not measured."""
    if manifest.encoder_layers:
        raise ConfigError("models of an encoder and a decoder are not calibrated: the protocol's thresholds hold")
    found = {Span(start, start + n) for n in lengths for start in range(manifest.layers - n + 1)}
    if manifest.output == "label":
        found = {span for span in found if span.end < manifest.layers}
    if not found:
        raise ConfigError(f"{manifest.name} has no spans of {', '.join(map(str, lengths))} layers")
    return sorted(found, key=lambda span: (span.start, span.end))


def measure(
    plan: Plan, environment: Mapping[str, str], say: Callable[[str], None]
) -> tuple[list[Kind], list[Measured]]:
    """The classes that this machine can show, and what was measured between them.

    One process at a time; memory: a span's weights. Raises ConfigError where there is but one class.
    """
    with tempfile.TemporaryDirectory(prefix="tallystick-calibrate-") as name:
        return _Measurement(plan, environment, say, Path(name)).run()


class _Measurement:
    def __init__(self, plan: Plan, environment: Mapping[str, str], say: Callable[[str], None], folder: Path) -> None:
        self._plan, self._environment, self._say, self._folder = plan, environment, say, folder
        self._manifest = folder / "manifest"
        self._manifest.write_bytes(plan.manifest.to_bytes())
        self._top_k = min(TOP_K, plan.manifest.vocab)
        self._rows: dict[int, Path] = {}
        self._hidden: dict[int, Path] = {}
        self._cheats: dict[Span, dict[str, tuple[Path, Path]]] = {}

    def run(self) -> tuple[list[Kind], list[Measured]]:
        with self._machine(HERE) as machine:
            self._walk(machine)
            answers = {HERE: self._answer(machine)}
            for span in self._plan.spans:
                rows, names = self._rows[span.start], fitting(len(span))
                self._cheats[span] = {cheat: machine.run(span, rows, cheat) for cheat in names}
            self._say(f"{HERE.name}: honest and {len(CHEATERS)} kinds of cheaters")
        for kind in [*CLASSES[1:], *(Kind(device, device=device) for device in self._plan.devices)]:
            with self._machine(kind) as machine:
                found = self._answer(machine)
            twin = next((other.name for other, known in answers.items() if _same(found, known)), None)
            self._say(f"{kind.name}: " + ("another class" if twin is None else f"the same bits as {twin}"))
            if twin is None:
                answers[kind] = found
        if len(answers) < 2:
            raise ConfigError("this machine shows one numeric class only: take one with AVX-512, or add --device")
        with self._machine(STOCK) as machine:
            stock = self._answer(machine)
        draw = Random(self._plan.seed)
        return list(answers), [self._compare(span, answers, stock, draw) for span in self._plan.spans]

    def _machine(self, kind: Kind) -> Machine:
        return Machine(kind, self._manifest, self._plan.pieces, self._folder, self._environment, self._top_k)

    def _walk(self, machine: Machine) -> None:
        """What enters each layer, as bytes that all classes are given, and as hidden rows."""
        plan = self._plan
        ids = plan.ids
        if ids is None:
            ids = machine.generate(plan.texts, plan.positions, plan.seed)
            self._say(f"{plan.texts} texts of {plan.positions} tokens are written")
        self._rows[0] = self._folder / "ids.npy"
        np.save(self._rows[0], ids)
        self._hidden[0] = machine.enter(self._rows[0])
        for layer in range(max(span.start for span in plan.spans)):
            self._rows[layer + 1] = self._hidden[layer + 1] = machine.run(Span(layer, layer + 1), self._rows[layer])[0]

    def _answer(self, machine: Machine) -> dict[Span, tuple[Path, Path]]:
        return {span: machine.run(span, self._rows[span.start]) for span in self._plan.spans}

    def _compare(self, span: Span, answers: dict[Kind, Any], stock: Any, draw: Random) -> Measured:
        challenges = [draw.randbytes(CHALLENGE_BYTES) for _ in range(CHALLENGES)]
        made: dict[Path, _Claims] = {}

        def claims(files: tuple[Path, Path]) -> _Claims:
            found = made.get(files[0])
            if found is None:
                is_hidden = self._plan.manifest.output_of(span) == "hidden"
                found = made[files[0]] = _Claims(files, self._hidden[span.start] if is_hidden else None, challenges)
            return found

        ranked = self._plan.manifest.output == "logits"
        found = Measured(span, CHALLENGES if self._plan.manifest.output_of(span) == "hidden" else 1)
        for one, other in combinations(answers, 2):
            apart = claims(answers[one][span]).errors(claims(answers[other][span]), ranked)
            found.honest[f"{one.name} / {other.name}"] = apart
        for kind, known in answers.items():
            found.stock[kind.name] = claims(stock[span]).errors(claims(known[span]), ranked)
        others = [claims(known[span]) for kind, known in answers.items() if kind is not HERE]
        for name, files in self._cheats[span].items():
            found.cheaters[name] = np.concatenate([claims(files).errors(one, ranked) for one in others], axis=1)
        return found


class _Claims:
    """What one node says of all windows of all texts: sketches of hidden rows, or results."""

    def __init__(self, files: tuple[Path, Path], entered: Path | None, challenges: Sequence[bytes]) -> None:
        left = np.load(files[0], allow_pickle=False)
        self._texts, self._windows = left.shape[0], left.shape[1] // WINDOW
        self._left = left
        self._sketches: list[list[Sketches]] = []
        if entered is None:
            self._scales = np.load(files[1], allow_pickle=False)
            return
        x = np.load(entered, allow_pickle=False)
        for text in range(self._texts):
            cuts = [slice(first, first + WINDOW) for first in range(0, self._windows * WINDOW, WINDOW)]
            self._sketches.append([
                sketch(challenge, Positions(cut.start, cut.stop), x[text, cut], left[text, cut])
                for cut in cuts for challenge in challenges
            ])  # fmt: skip

    def errors(self, auditor: _Claims, ranked: bool) -> Errors:
        """Of each window, as the auditor finds it."""
        if self._sketches:
            pairs = zip(self._sketches, auditor._sketches, strict=True)
            return np.array([[errors(a, b) for a, b in zip(one, other, strict=True)] for one, other in pairs])
        found = np.zeros((self._texts, self._windows, 2))
        for text in range(self._texts):
            for window in range(self._windows):
                cut = slice(window * WINDOW, (window + 1) * WINDOW)
                mine, theirs = ([row.tobytes() for row in side._left[text, cut]] for side in (self, auditor))
                apart = compare(mine, theirs, auditor._scales[text, cut], ranked)
                found[text, window] = apart.window, apart.quiet
        return found


def _same(one: dict[Span, tuple[Path, Path]], other: dict[Span, tuple[Path, Path]]) -> bool:
    return all(one[span][0].read_bytes() == other[span][0].read_bytes() for span in one)
