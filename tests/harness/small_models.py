"""A random model of three layers for the small world, and the loop to run it on."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from harness import samples
from harness.in_memory import InMemory
from harness.one_loop import FastLoop
from harness.small_world import Inline, World
from tallystick_protocol.manifest import Margin, Numerics
from tallystick_protocol.types import Span

T = TypeVar("T")


class Models:
    """A random model of three layers, in both numerics, each span of it loaded once."""

    def __init__(self) -> None:
        config = LlamaConfig(
            vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=256, pad_token_id=None,
        )  # fmt: skip
        self.found: dict[Numerics, tuple[InMemory, dict[Span, Inline]]] = {}
        kinds: tuple[Numerics, ...] = ("fp32", "bf16w")
        for numerics in kinds:
            model = InMemory(LlamaForCausalLM, config, numerics)
            pieces, anything = samples.manifest().pieces, ((0.0, 1e9),) * 4  # a model without them has no id
            measured = (Margin(1, 2, 1e-6, 1e-6),) if numerics == "fp32" else ()
            model.manifest = replace(model.manifest, pieces=pieces, norms=anything, margins=measured)
            self.found[numerics] = model, {span.span: Inline(span) for span in model.cut(1, 2)}

    def world(self, folder: Path, copies: int = 2, numerics: Numerics = "fp32") -> World:
        """A network of so many nodes for each layer. Make it on the loop that it shall live on."""
        model, engines = self.found[numerics]
        return World(model, dict(engines), copies, folder)

    def close(self) -> None:
        for _, engines in self.found.values():
            for engine in engines.values():
                engine.close()


def fast(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run it on a loop whose clock jumps over waiting."""
    loop, real = FastLoop(), time.monotonic
    time.monotonic = loop.time  # type: ignore[assignment]  # what waits looks at this clock, too
    try:
        return loop.run_until_complete(work())
    finally:
        time.monotonic = real  # type: ignore[assignment]
        loop.close()


@contextmanager
def small_models() -> Iterator[Models]:
    """The models for a module's tests, with one of torch's threads: they are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = Models()
    try:
        yield found
    finally:
        found.close()
        torch.set_num_threads(threads)
