"""Nodes that are far from each other: a delay on every link, pipeline and ring, with drafts and without."""

from __future__ import annotations

import asyncio
from typing import Any

from tallystick.client import AsyncClient
from tallystick_devnet.bench.asking import Timed, timed
from tallystick_devnet.bench.figures import Figures, Measured
from tallystick_devnet.bench.plan import Bench
from tallystick_devnet.bench.texts import NeverRight, quotation
from tallystick_protocol.sampling import Sampling

ONE_WAY_S = (0.005, 0.02, 0.05)
HEADLINE_S = 0.02
HOPS = 4


def _pairs(bench: Bench, delay_s: float) -> int:
    return bench.plan.pairs if delay_s == HEADLINE_S else bench.plan.far_pairs


def _name(delay_s: float) -> str:
    return f"{delay_s * 1000:.0f}ms"


async def _ask(bench: Bench, client: AsyncClient, delay_s: float, prompt: list[int], **options: Any) -> Timed:
    """One answer with a delay on every link."""
    tokens = options.pop("tokens", bench.plan.tokens)
    await asyncio.to_thread(bench.net.wires.delay, delay_s)
    try:
        return await timed(client, bench.net, prompt, tokens, verify="off", **options)
    finally:
        await asyncio.to_thread(bench.net.wires.delay, 0.0)


async def far_away(bench: Bench) -> Figures:
    """Seconds per token in pipeline and ring, next to the same answer without a delay; the star is arithmetic."""
    measured, equal = Measured(), True
    async with bench.net.client("wired4") as client:
        for delay_s in ONE_WAY_S:
            name = _name(delay_s)
            for _ in range(_pairs(bench, delay_s)):
                prompt = bench.prompt(bench.plan.prompt)
                near = await _ask(bench, client, 0.0, prompt)
                measured.note("pipeline_0ms_s", near.token_s)
                for mode, transits in (("pipeline", HOPS + 1), ("ring", HOPS)):
                    far = await _ask(bench, client, delay_s, prompt, mode=mode)
                    measured.note(f"{mode}_{name}_s", far.token_s)
                    measured.note(f"{mode}_{name}_vs_ideal", far.token_s / (near.token_s + transits * delay_s))
                    equal = equal and far.ids == near.ids
                measured.note(f"star_{name}_s_by_arithmetic", near.token_s + 2 * HOPS * delay_s)
            bench.say("  " + measured.last(name))
    return measured.figures() | {"ring_tokens_equal": int(equal)}


async def drafted(bench: Bench) -> Figures:
    """What drafts save where the text repeats itself, and what they cost where it does not, per delay on the links."""
    found, equal = Measured(), True
    async with bench.net.client("wired4") as client:
        for delay_s in ONE_WAY_S:
            for _ in range(_pairs(bench, delay_s)):
                same = await _gain(bench, client, delay_s, found)
                if delay_s == HEADLINE_S:
                    same = await _loss(bench, client, delay_s, found) and same
                equal = equal and same
            bench.say("  " + found.last(_name(delay_s)))
    return found.figures() | {"speculation_tokens_equal": int(equal)}


async def _gain(bench: Bench, client: AsyncClient, delay_s: float, found: Measured) -> bool:
    """A text that repeats itself, plain and drafted; whether the tokens are equal."""
    name, prompt = _name(delay_s), await quotation(bench)
    tokens = 2 * bench.plan.tokens if delay_s == HEADLINE_S else bench.plan.tokens
    plain = await _ask(bench, client, delay_s, prompt, tokens=tokens)
    lookup = await _ask(bench, client, delay_s, prompt, tokens=tokens, speculate="lookup")
    found.note(f"speculation_gain_{name}", plain.token_s / lookup.token_s)
    runs = [lookup]
    if delay_s == HEADLINE_S:
        auto = await _ask(bench, client, delay_s, prompt, tokens=tokens, speculate="auto")
        ring = await _ask(bench, client, delay_s, prompt, tokens=tokens, mode="ring")
        found.note(f"speculation_auto_gain_{name}", plain.token_s / auto.token_s)
        found.note(f"speculation_gain_on_ring_{name}", ring.token_s / lookup.token_s)
        found.note(f"speculation_right_share_{name}", lookup.answer.accepted / max(lookup.answer.drafted, 1))
        runs += [auto, ring]
    return all(run.ids == plain.ids for run in runs)


async def _loss(bench: Bench, client: AsyncClient, delay_s: float, found: Measured) -> bool:
    """A text drawn at random, which repeats nothing, and drafts that are never right; whether the tokens are equal.

    The loss is the share of the time that is added; below 0 is noise.
    """
    name, prompt = _name(delay_s), bench.prompt(bench.plan.prompt)
    drawn = Sampling(temperature=1.0, seed=bench.coins.randrange(1 << 32))
    plain = await _ask(bench, client, delay_s, prompt, sampling=drawn)
    lookup = await _ask(bench, client, delay_s, prompt, sampling=drawn, speculate="lookup")
    wrong = await _ask(bench, client, delay_s, prompt, sampling=drawn, speculate=NeverRight(bench))
    found.note(f"speculation_loss_{name}", lookup.token_s / plain.token_s - 1)
    found.note(f"speculation_never_right_loss_{name}", wrong.token_s / plain.token_s - 1)
    return lookup.ids == plain.ids == wrong.ids
