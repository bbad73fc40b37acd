"""From a model's name to an engine that serves a span of it: choose, fetch, check, load, reproduce, classify."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from tallystick_model.canary import check_canary
from tallystick_model.devices import CPU, Placement
from tallystick_model.kept_classes import KeptClasses, Measured
from tallystick_model.loader import load_span
from tallystick_model.numeric_class import STOCK
from tallystick_model.parallel import close_model, load_parallel
from tallystick_model.span import SpanModel
from tallystick_node.alone import alone
from tallystick_node.config import NodeConfig, process_environment
from tallystick_node.pieces import Pieces
from tallystick_node.placing import accelerators, place_span, room_on
from tallystick_node.planning.choice import Machine, candidates, choose, consider_move, weigh
from tallystick_node.planning.measure import check_memory, machine_for
from tallystick_node.planning.report import Plan, why_of, why_told
from tallystick_node.planning.supply import stacks_of
from tallystick_node.planning.survey import find_servers, supply_of
from tallystick_node.scheduling.engine import Engine
from tallystick_node.starting import Durations, fetch_and_load
from tallystick_protocol.chain.reads import Chain
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.errors import ConfigError
from tallystick_protocol.manifest import Manifest, Piece
from tallystick_protocol.transport.directory import Directory
from tallystick_protocol.types import Address, Digest, ModelId, Span

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A span that is ready to be served."""

    manifest: Manifest
    model: SpanModel
    numeric_class: Digest
    class_age_s: float
    """Since the class was measured by this machine."""


class Loading:
    """What a node knows of its model before and while it serves it."""

    def __init__(self, config: NodeConfig, chain: Chain, directory: Directory, model: ModelId, node: Address) -> None:
        self._config, self._chain, self._directory = config, chain, directory
        self._model, self._node = model, node
        state = config.state.expanduser()
        self._folder: Path = state / "pieces"
        self.store = LocalStore((config.store or state / "store").expanduser())
        self._classes = KeptClasses(config.class_cache.expanduser(), process_environment())
        self._draw = random.Random()
        self._machine: Machine | None = None
        self._devices: tuple[torch.device, ...] | None = None
        self._manifest: Manifest | None = None

    async def manifest(self) -> Manifest:
        if self._manifest is None:
            record = await asyncio.to_thread(self._chain.model, self._model)
            self._manifest = await (await self._pieces()).manifest(record)
        return self._manifest

    async def plan(
        self, at: Span | None = None, dwelt_s: float = float("inf"), *, told: Span | None = None
    ) -> Plan:
        """What this machine should serve, as the network is now. at: the span it serves, since dwelt_s seconds.

        told: the span that it serves in any case; then what that brings. Raises ManifestError for no such layers.
        """
        manifest = await self.manifest()
        if told is not None:
            manifest.stack_of(told)
        if self._machine is None:
            memory, cache, threads = self._config.memory, self._config.cache_bytes, self._config.num_threads
            room, mixed = await alone(self._room, manifest, threads=threads), self._config.device != "auto"
            measure = partial(machine_for, manifest, memory, cache, room, mixed=mixed)
            self._machine = await alone(measure, threads=threads)
        machine, stacks = self._machine, stacks_of(manifest.layers, manifest.encoder_layers)
        servers = await find_servers(self._chain, self._directory, self._model, self._node)
        supply = supply_of(servers, machine.rate)
        ranked = candidates(supply, stacks, machine)
        if told is not None:
            why = why_told(weigh(supply, stacks, machine, told), ranked, machine)
            return Plan(manifest, machine, supply, len(servers), ranked, told, why)
        if at is not None:
            verdict = consider_move(supply, stacks, machine, at, dwelt_s, self._draw, self._config.dwell_s)
            return Plan(manifest, machine, supply, len(servers), ranked, verdict.to or at, verdict.why)
        choice = choose(ranked, self._draw)
        why = why_of(ranked, choice, manifest, machine)
        return Plan(manifest, machine, supply, len(servers), ranked, None if choice is None else choice.span, why)

    async def choose_span(self) -> Span:
        """The span to begin with. Raises ConfigError when nothing fits."""
        plan = await self.plan()
        log.info("layers %s: %s", plan.choice, plan.why)
        if plan.choice is None:
            raise ConfigError(plan.why)
        return plan.choice

    def rate(self, span: Span) -> float | None:
        """Rows per second that this machine does of a span, where its speed was measured."""
        return None if self._machine is None else self._machine.rate(span)

    async def load(self, span: Span) -> Loaded:
        """Fetch and hash the pieces, load them, reproduce the canary, measure the class. Raises TallystickErrors."""
        config, took = self._config, Durations()
        manifest = await self.manifest()
        manifest.stack_of(span)
        manifest.span_pieces(span)
        threads = config.num_threads
        room = await alone(self._room, manifest, threads=threads)
        placement = place_span(config.device, manifest, span, room)
        check_memory(manifest, span, config.memory, placement)
        pieces = await self._pieces()
        model = await fetch_and_load(
            pieces, manifest, span, lambda open_piece: self._load(manifest, span, open_piece, placement), took
        )
        try:
            with took.of("canary"):
                error = await alone(self._reproduce, model, manifest, threads=threads)
            with took.of("class test"):
                measured = await alone(self._find_class, manifest, placement.distinct, threads=threads)
        except BaseException:
            close_model(model)
            raise
        log.info("layers %s loaded; the canary is reproduced to %.1e", placement, error)
        log.info("start took: %s", took)
        offered = measured.numeric_class
        log.info(
            "numeric class %s%s", offered.hex()[:16] if any(offered) else "stock",
            ", as this machine measured it before" if measured.age_s else "",
        )  # fmt: skip
        if config.store is None:
            await asyncio.to_thread(pieces.drop, manifest, span)
        return Loaded(manifest, model, offered, measured.age_s)

    def _room(self, manifest: Manifest) -> list[tuple[torch.device, int]]:
        """Accelerators, and bytes for weights there."""
        if self._devices is None:
            self._devices = accelerators(
                self._config, manifest, lambda model, devices: self._classes.find(model, devices).numeric_class
            )
        return room_on(self._devices, manifest, self._config.cache_bytes)

    def _reproduce(self, model: SpanModel, manifest: Manifest) -> float:
        try:
            return check_canary(model, manifest, self.store.get_block)
        except RuntimeError as error:
            if model.placement.distinct == (CPU,):
                raise
            raise ConfigError(
                f'{manifest.name} does not run with layers {model.placement}: {str(error)[:160]}; set device ='
                ' "cpu", or one that holds the whole span'
            ) from None

    def measure_class(self, manifest: Manifest, devices: Sequence[torch.device] = (CPU,)) -> Digest:
        """The class as the machine computes at this moment. devices: those that layers are on.

        Raises ConfigError where canonical results are asked for and the machine has none.
        """
        if self._config.execution == "stock":
            return STOCK
        return _canonical(self._classes.measure(manifest, devices), manifest, devices)

    def _find_class(self, manifest: Manifest, devices: Sequence[torch.device]) -> Measured:
        """The class to offer: the kept one, else as `measure_class`."""
        if self._config.execution == "stock":
            return Measured(STOCK, 0.0)
        found = self._classes.find(manifest, devices)
        _canonical(found.numeric_class, manifest, devices)
        return found

    def _load(
        self, manifest: Manifest, span: Span, open_piece: Callable[[Piece], Path], placement: Placement
    ) -> SpanModel:
        config = self._config
        if config.tensor_parallel > 1:
            return load_parallel(manifest, span, open_piece, config.tensor_parallel, config.num_threads)
        return load_span(
            manifest, span, open_piece, execution=config.execution, placement=placement, threads=config.num_threads
        )

    async def _pieces(self) -> Pieces:
        serving = await asyncio.to_thread(self._chain.serving, self._model)
        urls = [source for one in serving if one.record.node != self._node for source in one.contact.sources]
        return Pieces(self.store, self._folder, [*self._config.sources, *urls])


def _canonical(measured: Digest, manifest: Manifest, devices: Sequence[torch.device]) -> Digest:
    """The class, if it is one. Raises ConfigError for STOCK."""
    if not any(measured):
        names = ", ".join(map(str, devices))
        raise ConfigError(
            f"this machine is not canonical for {manifest.name} on {names}: its own chunkings disagree, or its devices"
            " do, or the model has no canonical rule; try other settings for threads or device, another machine, or"
            ' execution = "stock"'
        )
    return measured


async def write_plans(engine: Engine) -> None:
    """The last part of a start: it changes no bit of what the span computes, so the node serves meanwhile."""
    began = time.monotonic()
    written = await engine.run(engine.model.prepare)
    log.info("%s, which took %.2f s", "plans are written" if written else "no plans", time.monotonic() - began)
    began = time.monotonic()
    joined = [await engine.run(join) for join in engine.model.joins()]
    if joined:
        log.info("%d of %d groups joined in %.2f s", sum(joined), len(joined), time.monotonic() - began)


def self_check(loading: Loading, loaded: Loaded) -> Callable[[], Digest]:
    """A check to be run on the device thread: the canary again, on the weights as they lie in memory, then the class.

    Raises CorruptResult when memory or the machine no longer does what it did.
    """

    def check() -> Digest:
        check_canary(loaded.model, loaded.manifest, loading.store.get_block)
        return loading.measure_class(loaded.manifest, loaded.model.placement.distinct)

    return check
