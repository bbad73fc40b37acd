"""`scripts/bench`: the figures of one machine and one moment, as a table and, with --json, as one line of JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tallystick_devnet.bench.checkpoint import random_llama
from tallystick_devnet.bench.figures import Figures
from tallystick_devnet.bench.llamacpp import LlamaCpp, start_llamacpp
from tallystick_devnet.bench.network import GROUPS, bench_net
from tallystick_devnet.bench.plan import QUICK, Bench, Plan
from tallystick_devnet.bench.reference import Reference
from tallystick_devnet.bench.sections import SECTIONS
from tallystick_devnet.bench.texts import text_ids
from tallystick_protocol.errors import TallystickError
from tallystick_protocol.transport import loops

HEADLINES = (
    "nodes4_vs_generate", "llamacpp_rpc4_vs_generate", "sessions16_vs_1", "failover_s", "ring_20ms_vs_ideal",
    "speculation_gain_20ms",
)  # fmt: skip
"""In every run's JSON, null where they were not measured."""

WITH_LLAMACPP = ("generate", "sessions")


def main() -> int:
    options = _parser().parse_args()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    unknown = [name for name in options.only if name not in SECTIONS]
    if unknown:
        say(f"bench: no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
        return 2
    try:
        figures, failed = run(options, say)
    except TallystickError as error:
        say(f"bench: {error}")
        return 1
    table = Table("figure", "value", title=f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    for name, value in figures.items():
        table.add_row(name, "-" if value is None else f"{value:.4g}")
    Console(stderr=options.json).print(table)
    if options.json:
        print(json.dumps(figures))
    return 1 if failed else 0


def run(options: argparse.Namespace, say: Callable[[str], None]) -> tuple[Figures, list[str]]:
    """Measure what was asked for; the figures, and the sections that failed. Raises TallystickError."""
    checkpoint = options.model or random_llama(Path("~/.cache/tallystick-bench/llama-134m").expanduser())
    names = options.only or list(SECTIONS)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tallystick-bench-")))
        groups = [group for group in GROUPS if any(group in SECTIONS[name].groups for name in names)]
        say("starting the network")
        reference = stack.enter_context(Reference(checkpoint, options.threads))
        net = stack.enter_context(bench_net(folder, checkpoint, groups, options.threads, options.numerics, options.tls))
        llama: LlamaCpp | None = None
        if set(names) & set(WITH_LLAMACPP):
            llama = start_llamacpp(checkpoint, folder, stack, say)
        text = text_ids(checkpoint, net.manifest.vocab) if options.model else []
        plan, coins = QUICK if options.quick else Plan(), random.Random(options.seed)
        return measure(names, Bench(net, reference, llama, plan, say, coins, text))


def measure(names: Sequence[str], bench: Bench) -> tuple[Figures, list[str]]:
    """One section after the other. One that fails says so, and the others' figures are kept."""
    figures: Figures = dict.fromkeys(HEADLINES)
    failed = []
    for name in names:
        began = time.monotonic()
        bench.say(f"{name}:")
        try:
            figures |= loops.run(_section(name, bench))
        except (TallystickError, OSError, RuntimeError, ValueError) as error:
            bench.say(f"  failed: {error}")
            failed.append(name)
        bench.say(f"  took {time.monotonic() - began:.0f} s")
    return figures, failed


async def _section(name: str, bench: Bench) -> Figures:
    return await SECTIONS[name].measure(bench)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--model", type=Path, help="a checkpoint; without it, a random Llama of 134 M parameters")
    parser.add_argument("--numerics", choices=["fp32", "bf16w"], default="fp32", help="how the network computes")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1,
        help="threads of each process at most, generate's too; those that are there without it",
    )  # fmt: skip
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help=f"of: {','.join(SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help="one run of each: to see that it works")
    parser.add_argument("--tls", action="store_true", help="TLS between all processes, not only over delayed links")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON; the table goes to stderr")
    return parser


if __name__ == "__main__":
    sys.exit(main())
