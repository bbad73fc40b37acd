"""How much is measured, and what all sections work with."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tallystick_devnet.bench.llamacpp import LlamaCpp
from tallystick_devnet.bench.network import BenchNet
from tallystick_devnet.bench.reference import Reference


@dataclass(frozen=True, slots=True)
class Plan:
    """pairs: interleaved runs of each kind, of which the median counts; far_pairs: of those that take a minute each.

    prompt, tokens: of an answer. kills: of hops. long_prompt: the longer one of those whose first token is timed.
    """

    pairs: int = 7
    far_pairs: int = 3
    tokens: int = 64
    prompt: int = 64
    kills: int = 7
    long_prompt: int = 4096


QUICK = Plan(pairs=1, far_pairs=1, tokens=24, kills=2, long_prompt=1024)
"""To see that everything works."""


@dataclass(slots=True)
class Bench:
    """What the sections share. llama: llama.cpp, where it is. say: progress, for a person.

    text: ids of a text of the model's own language; empty for random weights.
    """

    net: BenchNet
    reference: Reference
    llama: LlamaCpp | None
    plan: Plan
    say: Callable[[str], None]
    coins: random.Random
    text: list[int]

    def prompt(self, length: int) -> list[int]:
        """Random ids; nothing of it was seen before."""
        return [self.coins.randrange(2, self.net.manifest.vocab) for _ in range(length)]

    def passage(self, length: int) -> list[int]:
        """A piece of the text, or random ids where there is none."""
        if len(self.text) <= length:
            return self.prompt(length)
        begin = self.coins.randrange(len(self.text) - length)
        return self.text[begin : begin + length]
