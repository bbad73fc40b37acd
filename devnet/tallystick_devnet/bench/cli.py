"""`scripts/bench`: the figures of one machine and one moment, as a table and, with --json, as one line of JSON."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tallystick_devnet.bench.checkpoint import random_llama
from tallystick_devnet.bench.llamacpp import measure_llamacpp
from tallystick_devnet.bench.network import bench_net, equal_spans
from tallystick_devnet.bench.reference import Reference
from tallystick_devnet.bench.sections import SECTIONS, Bench, Figures, Plan
from tallystick_protocol.errors import TallystickError

HEADLINES = (
    "nodes4_vs_generate", "llamacpp_rpc4_vs_generate", "sessions16_vs_1", "failover_s", "ring_20ms_vs_ideal",
    "speculation_gain_20ms",
)  # fmt: skip


def main() -> int:
    options = _parser().parse_args()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        figures = run(options, say)
    except TallystickError as error:
        say(f"bench: {error}")
        return 1
    table = Table("figure", "value", title=f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    for name, value in figures.items():
        table.add_row(name, "-" if value is None else f"{value:.4g}")
    Console(stderr=options.json).print(table)
    if options.json:
        print(json.dumps(figures))
    return 0


def run(options: argparse.Namespace, say: Callable[[str], None]) -> Figures:
    """Measure what was asked for."""
    cache = Path("~/.cache/tallystick-bench").expanduser()
    checkpoint = options.model or random_llama(cache / "llama-134m")
    plan = Plan(pairs=1, tokens=24, kills=2, long_prompt=1024) if options.quick else Plan()
    names = options.only.split(",") if options.only else list(SECTIONS)
    figures: Figures = dict.fromkeys(HEADLINES)
    layers = json.loads((checkpoint / "config.json").read_text())["num_hidden_layers"]
    spans = [*equal_spans(layers, 4), *equal_spans(layers, 4), *equal_spans(layers, 2), *equal_spans(layers, 1)]
    with tempfile.TemporaryDirectory(prefix="tallystick-bench-") as folder:
        say("starting the network")
        with (
            Reference(checkpoint, options.threads) as reference,
            bench_net(Path(folder), checkpoint, spans, options.threads, options.numerics) as net,
        ):
            bench = Bench(net, reference, plan, say, random.Random(options.seed))
            for name in names:
                began = time.monotonic()
                say(f"{name}:")
                figures |= asyncio.run(_section(name, bench))
                say(f"  took {time.monotonic() - began:.0f} s")
            if "generate" in names:
                figures |= measure_llamacpp(checkpoint, Path(folder), reference, plan, say)
    return figures


async def _section(name: str, bench: Bench) -> Figures:
    return await SECTIONS[name](bench)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--model", type=Path, help="a checkpoint; without it, a random Llama of 134 M parameters")
    parser.add_argument("--numerics", choices=["fp32", "bf16w"], default="fp32", help="how the network computes")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process, generate's too")
    parser.add_argument("--only", help="sections, with commas: " + ", ".join(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="one run of each: to see that it works")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON; the table goes to stderr")
    return parser


if __name__ == "__main__":
    sys.exit(main())
