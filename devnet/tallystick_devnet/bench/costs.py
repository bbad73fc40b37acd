"""What an answer costs beside time: bytes, signatures, hashes, CPU; and what rounding rows on the wire saves."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import numpy as np

from tallystick_devnet.bench.accounts import CRYPTOGRAPHY, KINDS, Account, counted
from tallystick_devnet.bench.asking import timed
from tallystick_devnet.bench.figures import Figures
from tallystick_devnet.bench.plan import Bench
from tallystick_protocol.wire import WIRES


async def where_it_goes(bench: Bench) -> Figures:
    """Per token: bytes over each hop's connections, signatures and hashes, CPU time of each node by kind of work."""
    plan, net, figures = bench.plan, bench.net, Figures()
    hops, tokens = net.groups["wired4"], 4 * plan.tokens
    async with net.client("wired4") as client:
        await timed(client, net, bench.prompt(plan.prompt), 8, verify="off")
        for node in hops:
            await asyncio.to_thread(net.begin_account, node)
        await asyncio.to_thread(net.passed)
        before_s = time.process_time()
        with counted() as ours:
            run = await timed(client, net, bench.prompt(8), tokens, verify="off")
        figures["client_cpu_ms_per_token"] = 1e3 * (time.process_time() - before_s) / tokens
        passed = await asyncio.to_thread(net.passed)
        accounts = [await asyncio.to_thread(net.account, node) for node in hops]
    figures["profiled_ms_per_token"] = 1e3 * run.token_s
    for number, (account, both) in enumerate(zip(accounts, passed, strict=True)):
        figures[f"hop{number}_bytes_per_token"] = sum(both) / tokens
        figures |= _shares(f"hop{number}", account, tokens)
    for name in CRYPTOGRAPHY:
        figures[f"{name}_per_token"] = (ours[name] + sum(account.counts[name] for account in accounts)) / tokens
        figures[f"client_{name}_per_token"] = ours[name] / tokens
    return figures


def _shares(hop: str, account: Account, tokens: int) -> Figures:
    figures: Figures = {f"{hop}_{kind}_cpu_share": account.share(kind) for kind in KINDS}
    figures[f"{hop}_waiting_share"] = account.waiting
    figures[f"{hop}_cpu_ms_per_token"] = 1e3 * account.busy_s / tokens
    return figures


async def rounded(bench: Bench) -> Figures:
    """What rounding of the rows between hops saves and changes: bytes per row and hop, the same largest logit, and the
    largest difference of a logit next to the standard deviation of all."""
    net, figures = bench.net, Figures()
    prompt = bench.prompt(4 * bench.plan.prompt)
    logits: dict[str, np.ndarray] = {}
    for wire in WIRES:
        async with net.client("wired4") as client:
            client.settings = replace(client.settings, wire=wire)
            await asyncio.to_thread(net.passed)
            async with client.decoder(net.id, max_length=len(prompt), dense=True, verify="off") as decoder:
                await decoder.feed(prompt, want="all")
                logits[wire] = np.stack([np.asarray(await decoder.row(at)) for at in range(len(prompt))])
                await decoder.finish()
            figures[f"wire_{wire}_bytes_per_row"] = (await asyncio.to_thread(net.passed))[1][0] / len(prompt)
        if wire != "f32":
            exact = logits["f32"]
            figures[f"wire_{wire}_same_token"] = float((logits[wire].argmax(1) == exact.argmax(1)).mean())
            figures[f"wire_{wire}_worst_logit"] = float(np.abs(logits[wire] - exact).max() / exact.std())
    return figures
