"""What is measured, a section each. Every section returns a flat dict of figures; ratios are of figures of one run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tallystick.verdict import Policy
from tallystick_devnet.bench.asking import timed, together
from tallystick_devnet.bench.costs import rounded, where_it_goes
from tallystick_devnet.bench.failover import failover
from tallystick_devnet.bench.far import drafted, far_away
from tallystick_devnet.bench.figures import Figures, Measured, ratios, spread
from tallystick_devnet.bench.plan import Bench
from tallystick_devnet.bench.routes import routes
from tallystick_protocol.errors import TallystickError

_POLICIES: dict[str, tuple[str, Policy, tuple[str, ...]]] = {
    "_unverified": ("free", "off", ()),
    "_verified": ("free", "audit", ("auditor",)),
    "": ("paid", "audit", ("auditor",)),
    "_full": ("paid", "full", ("auditor",)),
}
WAYS: dict[str, tuple[tuple[str, ...], Policy]] = {
    f"nodes{count}{name}": ((f"{price}{count}", *others), policy)
    for count in (1, 2, 4)
    for name, (price, policy, others) in _POLICIES.items()
    if name != "_full" or count == 4
}
"""By how many nodes an answer is carried: groups of nodes, and how it is verified. `full` takes twice the work."""

COUNTS = (1, 4, 16, 32)
BATCHES = (16, 32)


async def against_generate(bench: Bench) -> Figures:
    """One session over 1, 2 and 4 nodes in every way, each next to a run of `generate` on the same prompt."""
    kinds = ("tokens_per_s", "vs_generate", "settled_vs_generate")
    measured = Measured(["generate_tokens_per_s", *(f"{name}_{kind}" for name in WAYS for kind in kinds)])
    equal, audited = True, 0
    await asyncio.to_thread(bench.reference.generate, bench.prompt(8), 8)
    for groups, policy in WAYS.values():
        async with bench.net.client(*groups) as client:
            await timed(client, bench.net, bench.prompt(8), 8, verify=policy)
    for _ in range(bench.plan.pairs):
        for name in bench.coins.sample(list(WAYS), len(WAYS)):
            try:
                same, checks = await _pair(bench, name, measured)
            except TallystickError as error:
                bench.say(f"  {name}: {error}")
                continue
            equal, audited = equal and same, audited + (checks > 0 and WAYS[name][1] == "audit")
        await _llama_pair(bench, measured)
        bench.say("  " + measured.last("tokens_per_s"))
    return measured.figures() | {"tokens_equal": int(equal), "audited_answers": audited}


async def _pair(bench: Bench, name: str, measured: Measured) -> tuple[bool, int]:
    """One run of `generate` and one of ours; whether the tokens are equal, and how many windows were recomputed."""
    prompt, tokens = bench.prompt(bench.plan.prompt), bench.plan.tokens
    theirs = await asyncio.to_thread(bench.reference.generate, prompt, tokens)
    groups, policy = WAYS[name]
    async with bench.net.client(*groups, audits=True) as client:
        ours = await timed(client, bench.net, prompt, tokens, verify=policy)
    base = (tokens - 1) / theirs["rest_s"]
    measured.note("generate_tokens_per_s", base)
    measured.note(f"{name}_tokens_per_s", ours.rate)
    measured.note(f"{name}_vs_generate", ours.rate / base)
    measured.note(f"{name}_settled_vs_generate", ours.settled_rate / base)
    if ours.ids != theirs["ids"]:
        bench.say(f"  {name}: other tokens than generate")
    return ours.ids == theirs["ids"], len(ours.answer.verdict.checks)


async def _llama_pair(bench: Bench, measured: Measured) -> None:
    if bench.llama is None:
        return
    tokens = bench.plan.tokens
    theirs = await asyncio.to_thread(bench.reference.generate, bench.prompt(bench.plan.prompt), tokens)
    rate = await asyncio.to_thread(bench.llama.decode, tokens)
    if rate is not None:
        measured.note("llamacpp_rpc4_tokens_per_s", rate)
        measured.note("llamacpp_rpc4_vs_generate", rate * theirs["rest_s"] / (tokens - 1))


async def side_by_side(bench: Bench) -> Figures:
    """Aggregate tokens per second of 1, 4, 16 and 32 sessions over four nodes, verified and paid."""
    plan, net, measured = bench.plan, bench.net, Measured()
    tokens = 2 * plan.tokens
    async with net.client("paid4", "auditor", audits=True) as client:
        for _ in range(plan.pairs):
            for count in COUNTS:
                prompts = [bench.prompt(plan.prompt) for _ in range(count)]
                measured.note(f"sessions{count}_tokens_per_s", await together(client, net, prompts, tokens))
            for count in BATCHES if bench.llama is not None else ():
                assert bench.llama is not None
                rate = await asyncio.to_thread(bench.llama.together, count, plan.prompt, tokens)
                if rate is not None:
                    measured.note(f"llamacpp_rpc4_sessions{count}_tokens_per_s", rate)
            bench.say("  " + measured.last())
    return measured.figures() | _compared(measured.values)


def _compared(values: dict[str, list[float]]) -> Figures:
    """Many sessions against one, and against llama.cpp's, where every pair of it was measured."""
    figures: Figures = {}
    for count in COUNTS:
        ours = values[f"sessions{count}_tokens_per_s"]
        figures |= spread(f"sessions{count}_vs_1", ratios(ours, values["sessions1_tokens_per_s"]))
        theirs = values.get(f"llamacpp_rpc4_sessions{count}_tokens_per_s", [])
        if len(theirs) == len(ours):
            figures |= spread(f"sessions{count}_vs_llamacpp_rpc4", ratios(ours, theirs))
    return figures


async def first_token(bench: Bench) -> Figures:
    """Seconds until the first token of prompts of 512 and more, of a client that has asked before."""
    net, plan, measured = bench.net, bench.plan, Measured()
    longest = min(plan.long_prompt, net.manifest.max_length - 8)
    async with net.client("paid4", "auditor", audits=True) as client:
        await timed(client, net, bench.prompt(8), 8)
        for length, pairs in ((min(512, longest), plan.pairs), (longest, plan.far_pairs)):
            name = f"first_token_{length}"
            for _ in range(pairs):
                prompt = bench.prompt(length)
                theirs = await asyncio.to_thread(bench.reference.generate, prompt, 2)
                ours = await timed(client, net, prompt, 2)
                measured.note(f"{name}_s", ours.first_s)
                measured.note(f"{name}_generate_s", theirs["first_s"])
                measured.note(f"{name}_vs_generate", ours.first_s / theirs["first_s"])
            bench.say("  " + measured.last(name))
    return measured.figures()


async def planned(bench: Bench) -> Figures:
    """A thousand offers, most of them dead: asked, and planned."""
    measured = Measured()
    for _ in range(bench.plan.pairs):
        for name, value in (await routes(bench.coins.randrange(1 << 30))).items():
            measured.note(name, value)
    bench.say("  " + measured.last())
    return measured.figures()


@dataclass(frozen=True, slots=True)
class Section:
    """groups: the nodes that it takes (`network.GROUPS`)."""

    measure: Callable[[Bench], Awaitable[Figures]]
    groups: tuple[str, ...] = ()


SECTIONS: dict[str, Section] = {
    "generate": Section(against_generate, ("free1", "free2", "free4", "paid1", "paid2", "paid4", "auditor")),
    "sessions": Section(side_by_side, ("paid4", "auditor")),
    "first-token": Section(first_token, ("paid4", "auditor")),
    "delays": Section(far_away, ("wired4",)),
    "speculation": Section(drafted, ("wired4",)),
    "failover": Section(failover, ("paid4", "wired4")),
    "profile": Section(where_it_goes, ("wired4",)),
    "wire": Section(rounded, ("wired4",)),
    "routes": Section(planned),
}
