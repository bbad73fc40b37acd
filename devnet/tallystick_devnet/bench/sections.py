"""What is measured, a section each. Every section returns a flat dict of figures; ratios are of figures of one run."""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import numpy as np

from tallystick.generation import Token
from tallystick_devnet.bench.network import BenchNet, Timed, timed, together
from tallystick_devnet.bench.reference import Reference
from tallystick_devnet.bench.routes import routes
from tallystick_protocol.wire import WIRES

Figures = dict[str, float | None]
ONE_WAY_S = (0.005, 0.02, 0.05)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured. pairs: interleaved runs of each kind, of which the median counts."""

    pairs: int = 7
    tokens: int = 64
    prompt: int = 64
    kills: int = 7
    long_prompt: int = 4096


@dataclass(slots=True)
class Bench:
    """What the sections share. say: progress, for a person."""

    net: BenchNet
    reference: Reference
    plan: Plan
    say: Callable[[str], None]
    coins: random.Random

    def prompt(self, length: int) -> list[int]:
        """Random ids; nothing of it was seen before."""
        return [self.coins.randrange(2, self.net.manifest.vocab) for _ in range(length)]


async def against_generate(bench: Bench) -> Figures:
    """One session over 1, 2 and 4 nodes, next to `generate`; the tokens must be the same."""
    plan, net, figures = bench.plan, bench.net, Figures()
    rates: dict[str, list[float]] = {"generate": []}
    ratios: dict[str, list[float]] = {}
    for _ in range(plan.pairs):
        prompt = bench.prompt(plan.prompt)
        theirs = await asyncio.to_thread(bench.reference.generate, prompt, plan.tokens)
        base = (plan.tokens - 1) / theirs["rest_s"]
        rates["generate"].append(base)
        for count, verify in ((1, "off"), (2, "off"), (4, "off"), (4, "audit"), (4, "full")):
            only = net.copies(4) if verify == "full" else net.cover(count)
            async with net.client(only) as client:
                ours = await timed(client, net, prompt, plan.tokens, verify=verify)
            if ours.ids != theirs["ids"]:
                bench.say(f"  {count} nodes, {verify}: other tokens than generate")
            name = f"nodes{count}" + {"off": "_unverified", "audit": "", "full": "_full"}[verify]
            rates.setdefault(name, []).append(ours.rate)
            ratios.setdefault(name, []).append(ours.rate / base)
        bench.say("  " + ", ".join(f"{name} {found[-1]:.1f}" for name, found in rates.items()))
    for name, found in rates.items():
        figures[f"{name}_tokens_per_s"] = statistics.median(found)
    for name, found in ratios.items():
        figures[f"{name}_vs_generate"] = statistics.median(found)
        figures[f"{name}_vs_generate_low"], figures[f"{name}_vs_generate_high"] = min(found), max(found)
    return figures


async def side_by_side(bench: Bench) -> Figures:
    """Aggregate tokens per second of 1, 4, 16 and 32 sessions over four nodes."""
    plan, net, figures = bench.plan, bench.net, Figures()
    found: dict[int, list[float]] = {}
    async with net.client(net.cover(4)) as client:
        for _ in range(max(plan.pairs // 2, 1)):
            for count in (1, 4, 16, 32):
                prompts = [bench.prompt(plan.prompt) for _ in range(count)]
                found.setdefault(count, []).append(await together(client, net, prompts, plan.tokens))
            bench.say("  " + ", ".join(f"{count} sessions {rates[-1]:.1f}" for count, rates in found.items()))
    for count, rates in found.items():
        figures[f"sessions{count}_tokens_per_s"] = statistics.median(rates)
        figures[f"sessions{count}_vs_1"] = statistics.median(
            many / one for many, one in zip(rates, found[1], strict=True)
        )
    return figures


async def first_token(bench: Bench) -> Figures:
    """Seconds from the request to the first token, for prompts of 512 and more tokens."""
    net, figures = bench.net, Figures()
    for length in (512, min(bench.plan.long_prompt, net.manifest.max_length - 8)):
        ours, theirs = [], []
        for _ in range(max(bench.plan.pairs // 3, 1)):
            prompt = bench.prompt(length)
            theirs.append((await asyncio.to_thread(bench.reference.generate, prompt, 2))["first_s"])
            async with net.client(net.cover(4)) as client:
                ours.append((await timed(client, net, prompt, 2, verify="off")).first_s)
        figures[f"first_token_{length}_s"] = statistics.median(ours)
        figures[f"first_token_{length}_generate_s"] = statistics.median(theirs)
        bench.say(f"  {length} tokens: {statistics.median(ours):.2f} s, generate {statistics.median(theirs):.2f} s")
    return figures


async def far_away(bench: Bench) -> Figures:
    """Seconds per token with a delay on every link: pipeline and ring, plain and with drafts from the text itself."""
    plan, net, figures = bench.plan, bench.net, Figures()
    count, tokens = 4, max(plan.tokens // 2, 24)
    async with net.client(net.cover(count)) as client:
        near = await _median_step(lambda: timed(client, net, bench.prompt(plan.prompt), tokens, verify="off"), plan)
        figures["pipeline_0ms_s"] = near
        try:
            for delay_s in ONE_WAY_S:
                await asyncio.to_thread(net.wires.delay, delay_s)
                name = f"{delay_s * 1000:.0f}ms"
                for mode in ("pipeline", "ring"):
                    step = await _median_step(
                        lambda mode=mode: timed(  # type: ignore[misc]
                            client, net, bench.prompt(plan.prompt), tokens, verify="off", mode=mode
                        ),
                        plan,
                    )
                    figures[f"{mode}_{name}_s"] = step
                    ideal = near + (count if mode == "ring" else count + 1) * delay_s
                    figures[f"{mode}_{name}_vs_ideal"] = step / ideal
                figures[f"star_{name}_s_by_arithmetic"] = near + 2 * count * delay_s
                quoted = _quoted(bench)
                plain = await timed(client, net, quoted, 2 * tokens, verify="off")
                drafted = await timed(client, net, quoted, 2 * tokens, verify="off", speculate="lookup")
                assert plain.ids == drafted.ids
                figures[f"speculation_gain_{name}"] = plain.rest_s / drafted.rest_s
                told = (f"{key} {value:.3f}" for key, value in figures.items() if f"_{name}" in key and value)
                bench.say("  " + ", ".join(told))
        finally:
            await asyncio.to_thread(net.wires.delay, 0.0)
    return figures


async def failover(bench: Bench) -> Figures:
    """Seconds from SIGKILL of a hop to the next token, and the longest gap between two tokens of the same stream."""
    plan, net = bench.plan, bench.net
    found, gaps = [], []
    for attempt in range(plan.kills):
        async with net.client(net.copies(4)) as client:
            stream = client.stream(bench.prompt(plan.prompt), model=net.id, max_tokens=plan.tokens, ignore_eos=True,
                                   verify="off")  # fmt: skip
            killed_at, count, last = 0.0, 0, 0.0
            async for event in stream:
                if not isinstance(event, Token):
                    continue
                now = asyncio.get_running_loop().time()
                if killed_at and count == plan.tokens // 3 + 1:
                    found.append(now - killed_at)
                    gaps.append(now - last)
                    bench.say(f"  kill {attempt + 1}: next token after {found[-1]:.2f} s")
                count, last = count + 1, now
                if count == plan.tokens // 3 + 1 and not killed_at:
                    route = [net.by_address(hop.node) for hop in stream.session_route]
                    spare = [n for n in route if sum(o.span == n.span and o.process.alive for o in net.nodes) > 1]
                    victim = spare[attempt % len(spare)]
                    victim.process.kill()
                    killed_at = asyncio.get_running_loop().time()
        for node in [node for node in net.nodes if not node.process.alive]:
            await asyncio.to_thread(net.revive, node)
    return {"failover_s": statistics.median(found), "failover_worst_s": max(found)}


async def where_it_goes(bench: Bench) -> Figures:
    """Bytes on the wire per token and hop, signatures and hashes per token, and each node's time by kind of work."""
    plan, net, figures = bench.plan, bench.net, Figures()
    hops = net.cover(4)
    async with net.client(hops) as client:
        await timed(client, net, bench.prompt(plan.prompt), 8, verify="off")
        for node in hops:
            await asyncio.to_thread(net.samples, node)
        await asyncio.to_thread(net.wires.count)
        tokens = 4 * plan.tokens
        run = await timed(client, net, bench.prompt(8), tokens, verify="off")
        passed = await asyncio.to_thread(net.wires.count)
        shares = [await asyncio.to_thread(net.samples, node) for node in hops]
    at = {id(node): index for index, node in enumerate(net.nodes)}
    for number, (node, share) in enumerate(zip(hops, shares, strict=True)):
        figures[f"hop{number}_bytes_per_token"] = sum(passed[at[id(node)]]) / tokens
        busy = 1.0 - share.get("waiting", 0.0)
        for kind in ("model", "hashing", "signing", "framing", "other"):
            figures[f"hop{number}_{kind}_share_of_busy"] = share.get(kind, 0.0) / busy if busy else None
        figures[f"hop{number}_waiting_share"] = share.get("waiting", 0.0)
    rows = tokens + 8
    windows = run.answer.verdict.receipts
    figures["signatures_per_token"] = 2 * windows / rows  # a receipt and a voucher each
    figures["hashes_per_token"] = len(hops) * (2 + 2)  # two leaves a row and hop, and as many inner nodes of the trees
    return figures


async def rounded(bench: Bench) -> Figures:
    """What rounding of the rows between hops saves and changes: bytes per row and hop, the same largest logit, and the
    largest difference of a logit next to the standard deviation of all."""
    net, figures = bench.net, Figures()
    prompt = bench.prompt(4 * bench.plan.prompt)
    logits: dict[str, np.ndarray] = {}
    for wire in WIRES:
        async with net.client(net.cover(4)) as client:
            client.settings = replace(client.settings, wire=wire)
            await asyncio.to_thread(net.wires.count)
            async with client.decoder(net.id, max_length=len(prompt), dense=True, verify="off") as decoder:
                await decoder.feed(prompt, want="all")
                logits[wire] = np.stack([np.asarray(await decoder.row(at)) for at in range(len(prompt))])
                await decoder.finish()
            passed = await asyncio.to_thread(net.wires.count)
        middle = net.nodes.index(net.cover(4)[1])
        figures[f"wire_{wire}_bytes_per_row"] = passed[middle][0] / len(prompt)
        if wire != "f32":
            exact = logits["f32"]
            figures[f"wire_{wire}_same_token"] = float((logits[wire].argmax(1) == exact.argmax(1)).mean())
            figures[f"wire_{wire}_worst_logit"] = float(np.abs(logits[wire] - exact).max() / exact.std())
    return figures


async def _median_step(run: Callable[[], Awaitable[Timed]], plan: Plan) -> float:
    steps = []
    for _ in range(max(plan.pairs // 2, 1)):
        found = await run()
        steps.append(statistics.median(found.gaps_s))
    return statistics.median(steps)


def _quoted(bench: Bench) -> list[int]:
    """A text that repeats itself, as code and quotations do."""
    passage = bench.prompt(24)
    return passage * 4


async def planned(bench: Bench) -> Figures:
    """A thousand offers, most of them dead: asked, and planned."""
    return await routes(bench.coins.randrange(1 << 30))


SECTIONS: dict[str, Callable[[Bench], Awaitable[Figures]]] = {
    "generate": against_generate,
    "sessions": side_by_side,
    "first-token": first_token,
    "delays": far_away,
    "failover": failover,
    "profile": where_it_goes,
    "wire": rounded,
    "routes": planned,
}
