"""Plans: a span's forward, written down once, for the calls in which sessions share rows.

A span runs transformers' own forward; at decode sizes most of its time outside products is Python. Its steps are
recorded at a few sizes and run from then on as straight lists of calls (`canonical/program.py`). No architecture is
known: what cannot be recorded, or gives other bits on rows that are tried, is not planned.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from tallystick_model.canonical.cache import KvCache
from tallystick_model.canonical.packing import Part
from tallystick_model.canonical.program import Program, Recording
from tallystick_model.canonical.recording import Recorder, Unrecordable
from tallystick_model.canonical.tiles import R
from tallystick_model.ghosts import Leave
from tallystick_model.segments import Segment, place
from tallystick_model.skeleton import BUILD_ERRORS

if TYPE_CHECKING:
    from tallystick_model.span import SpanModel

_log = logging.getLogger(__name__)

_SIZES = ((5, 2), (7, 3), (10, 5), (13, 4))
"""(rows, rows whose logits are wanted) of the recordings."""

_SESSIONS = ((1,), (3,), (3, 7, 1))
"""Rows of the sessions in the calls that are tried, each _TURNS times: step by step first, then straight. What steps
and short drafts take is ready then."""

_TURNS = 4

_MIN_LENGTH = _TURNS * max(rows for sizes in _SESSIONS for rows in sizes)


Key = tuple[Any, ...]
"""Whether the forward stops before the head, and the names of its arguments."""


class Plan:
    """One way through a span: to its end (result None: the streams leave), or on to the model's result of that name."""

    def __init__(self, program: Program, result: str | None) -> None:
        self.program, self._result = program, result

    def run(self, inputs: Sequence[Any], rows: int, selected: int) -> Any:
        """As the model's forward: returns what has the result, or raises `Leave`."""
        tensors = [value.contiguous() for value in inputs if isinstance(value, torch.Tensor)]
        outs = self.program.run(tensors, rows, selected)
        if self._result is None:
            raise Leave(outs)
        return SimpleNamespace(**{self._result: outs[0]})


class Trial:
    """Rows to try a span with, and what comes of them."""

    def __init__(self, model: SpanModel) -> None:
        self._model = model
        self.heads = model.is_last and model.manifest.output_of(model.span) == "logits"

    def segment(self, rows: int, seed: int) -> Segment:
        """The first rows of a new session."""
        model = self._model
        cache = model.new_cache(model.manifest.max_length) if model.causal else None
        return Segment(cache, 0, self._rows(rows, seed))

    def _rows(self, count: int, seed: int) -> torch.Tensor:
        manifest, drawn = self._model.manifest, torch.Generator().manual_seed(seed)
        if self._model.is_first:
            return torch.randint(0, manifest.vocab, (count,), generator=drawn)
        return torch.randn(count, manifest.width, generator=drawn)

    def outcomes(self) -> list[torch.Tensor]:
        """What some calls return."""
        found, causal = [], self._model.causal
        for lengths in _SESSIONS:
            segments = [self.segment(rows, seed) for seed, rows in enumerate(lengths)]
            for turn in range(_TURNS):
                wanted = [None, [], [0], []][turn]  # every other step ends before the head, if there is one
                then = [
                    Segment(one.cache, turn * len(one) * causal, self._rows(len(one), turn), wanted=wanted)
                    for one in segments
                ]
                found += self._model.forward(then)
        return found

    def agrees(self, plans: dict[Key, Plan]) -> bool:
        """Whether the span returns the same bits with plans as without."""
        kept = self._model._plans
        kept.clear()
        expected = self.outcomes()
        kept |= plans
        return all(torch.equal(one, other) for one, other in zip(self.outcomes(), expected, strict=True))


def write_plans(model: SpanModel) -> dict[Key, Plan]:
    """Plans for a span whose calls are shared and which is on the CPU; empty where there can be none."""
    trial = Trial(model)
    try:
        if model.causal and model.manifest.max_length < _MIN_LENGTH:
            raise Unrecordable(f"sessions of less than {_MIN_LENGTH} positions")
        _without_warnings(model._spliced.skeleton.model)
        model.forward([trial.segment(4, 0)])  # routers pack their weights when first called
        plans = dict(_write(model, trial, stop=stop) for stop in ((False, True) if trial.heads else (False,)))
        if not trial.agrees(plans):
            raise Unrecordable("a plan gives other bits")
    except (Unrecordable, *BUILD_ERRORS) as error:
        _log.info("no plan for layers %s: %s", model.span, str(error)[:160])
        return {}
    return plans


def _without_warnings(whole: Any) -> None:
    """Some forwards read the ids to warn of padding; no rows are padding here."""
    for module in whole.modules():
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):
            module.warn_if_padding_and_no_attention_mask = lambda *args: None


def _write(model: SpanModel, trial: Trial, *, stop: bool) -> tuple[Key, Plan]:
    recordings, names, ways = [], set(), set()
    for rows, most in _SIZES:
        selected = most if trial.heads and not stop else 0
        forward, inputs, received = _rehearse(model, trial.segment(rows, rows), selected, stop=stop)
        tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
        with Recorder([*tensors, *received]) as recorder:
            way, found = _result(forward)
        numbers = [recorder.number_of(tensor) for tensor in found]
        recordings.append(Recording(rows, selected, recorder.steps, recorder.inputs, numbers))
        names.add(tuple(inputs))
        ways.add(way)
    if len(ways) > 1 or len(names) > 1:
        raise Unrecordable("another number of rows has another kind of result")
    return (stop, *names.pop()), Plan(Program(recordings), ways.pop())


def _rehearse(
    model: SpanModel, segment: Segment, selected: int, *, stop: bool
) -> tuple[Callable[[], Any], dict[str, Any], Sequence[torch.Tensor]]:
    """The model's own forward for one segment, all set to run; its arguments, and the streams that enter.

    selected: how many of the rows go to the head.
    """
    spliced, rules = model._spliced, model._spliced.rules
    assert rules is not None
    parts = [Part(0, 0, len(segment))]
    if isinstance(segment.cache, KvCache):
        segment.cache.reserve(len(segment) + R - 1)
    inputs, num_rows = model._inputs([segment], parts)
    spliced.passage.stop = stop
    rules.batch.begin(place([segment], parts))
    rules.selection[:] = [torch.arange(selected)] if selected else []

    def forward() -> Any:
        with spliced.operators or nullcontext():
            return model.run_model(inputs, num_rows)

    return forward, inputs, spliced.passage.received or []


def _result(forward: Callable[[], Any]) -> tuple[str | None, list[torch.Tensor]]:
    try:
        output = forward()
    except Leave as leave:
        return None, leave.streams
    for name in ("logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return name, [getattr(output, name)]
    raise Unrecordable("its result is of another kind")
