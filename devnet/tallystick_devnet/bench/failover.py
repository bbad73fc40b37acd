"""A hop is killed in the middle of an answer: how long its reader waits."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise

from tallystick.generation import Stream, Token
from tallystick_devnet.bench.asking import longest_stall
from tallystick_devnet.bench.figures import Figures, spread
from tallystick_devnet.bench.network import BenchNet
from tallystick_devnet.bench.plan import Bench


async def failover(bench: Bench) -> Figures:
    """Seconds from SIGKILL of a hop to the next token that it takes part in, and the longest gap of those streams.

    A token that had left the hop when it was killed comes on time, so what counts is the longest wait after the kill.
    """
    plan, net, stalls, gaps, equal = bench.plan, bench.net, [], [], True
    for attempt in range(plan.kills):
        prompt = bench.prompt(plan.prompt)
        expected = await asyncio.to_thread(bench.reference.generate, prompt, plan.tokens)
        async with net.client("paid4", "wired4") as client:
            stream = client.stream(prompt, model=net.id, max_tokens=plan.tokens, ignore_eos=True, verify="off")
            times, killed_at = await _read_and_kill(net, stream, attempt, plan.tokens // 3 + 1)
        equal = equal and stream.answer.ids == expected["ids"]
        stalls.append(longest_stall(times, killed_at))
        gaps.append(max(late - early for early, late in pairwise(times)))
        bench.say(f"  kill {attempt + 1}: next token after {stalls[-1]:.2f} s")
        for node in [node for node in net.nodes if not node.process.alive]:
            await asyncio.to_thread(net.revive, node)
    return spread("failover_s", stalls) | {"failover_worst_gap_s": max(gaps), "failover_tokens_equal": int(equal)}


async def _read_and_kill(net: BenchNet, stream: Stream, attempt: int, after: int) -> tuple[list[float], float]:
    """When tokens came, and when a hop was killed: behind `after` tokens, another hop each time."""
    times: list[float] = []
    killed_at = 0.0
    async for event in stream:
        if not isinstance(event, Token):
            continue
        times.append(time.perf_counter())
        if len(times) == after:
            route = stream.session_route
            victim = net.by_address(route[attempt % len(route)].node)
            killed_at = time.perf_counter()
            victim.process.kill()
    return times, killed_at
