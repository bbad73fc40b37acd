"""The zoo of cheaters: who is caught by what, after how many audits, and whether an honest node is ever accused."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from faults.breaking import BREAKING
from faults.computing import COMPUTING
from harness.small_models import Models
from tallystick_devnet.localchain import repository
from tallystick_protocol.manifest import Numerics
from zoo.across import HONEST, judge, measure_across
from zoo.cheaters import measure
from zoo.drift import Flips, flips
from zoo.honest import Tally, honest_audits
from zoo.protocol import SCENARIOS, perform
from zoo.table import lines, put_table, to_99

PAGE = repository() / "docs" / "verification.md"


def computing(texts: int, seed: int) -> dict[str, dict[str, Any]]:
    """Nodes that compute wrongly."""
    found = measure(texts, seed, say=say)
    fp32, bf16w = (measure_across(texts, seed, numerics, say) for numerics in ("fp32", "bf16w"))
    rows = {}
    for name, one in found.items():
        across, rounded = judge(fp32[name], seed), judge(bf16w[name], seed)
        rows[name] = {
            "what": COMPUTING[name].what,
            "check": "`hash`",
            "detected": one.detected,
            "detected_across_classes": across.detected,
            "detected_across_classes_bf16w": rounded.detected,
            "audits_to_99": to_99(one.detected),
            "audits_to_99_across_classes": across.audits_to_99,
            "audits_to_99_across_classes_bf16w": rounded.audits_to_99,
            "windows_to_99_across_classes": across.windows_to_99,
            "windows_to_99_across_classes_bf16w": rounded.windows_to_99,
        }
        spans = [f"{x.worst:.1e}/{y.worst:.1e}" for x, y in zip(fp32[name], bf16w[name], strict=True)]
        say(f"{name}: errors as shares of guilty, fp32/bf16w, by span: {', '.join(spans)}")
    for numerics, seen in (("fp32", fp32), ("bf16w", bf16w)):
        honest = seen[HONEST]
        assert not judge(honest, seed).detected, "an honest node of another class was found guilty"
        say(f"honest across classes, {numerics}: at most {max(one.worst for one in honest):.1e} of guilty")
    return rows


def breaking(folder: Path) -> dict[str, dict[str, Any]]:
    """Nodes that break the protocol. What no audit is needed for is found after none, in whatever class."""
    rows, models = {}, Models()
    try:
        for name, scenario in SCENARIOS.items():
            outcome = perform(models, scenario, folder / name)
            caught = float(scenario.check in outcome.checks and not outcome.innocent)
            say(f"{name}: {', '.join(sorted(outcome.checks)) or outcome.error or 'nothing'}")
            audits = int(scenario.audits) if caught else None
            across = None if scenario.audits else caught
            rows[name] = {
                "what": " and ".join(BREAKING[part].what for part in scenario.who.values()),
                "check": f"`{scenario.check}`",
                "detected": caught,
                "detected_across_classes": across,
                "detected_across_classes_bf16w": across,
                "audits_to_99": audits,
                "audits_to_99_across_classes": None if across is None else audits,
                "audits_to_99_across_classes_bf16w": None if across is None else audits,
                "windows_to_99_across_classes": None if across is None else audits,
                "windows_to_99_across_classes_bf16w": None if across is None else audits,
            }
    finally:
        models.close()
    return rows


def report(cheaters: dict[str, dict[str, Any]], tally: Tally, bought: dict[str, Flips]) -> dict[str, Any]:
    return {
        "cheaters": {
            name: {key: value for key, value in one.items() if key not in ("what", "check")}
            for name, one in cheaters.items()
        },
        "flips_under_tolerance": {name: [one.random, one.aimed, one.tokens] for name, one in bought.items()},
        "honest_audits": tally.audits.total(),
        "honest_windows": tally.windows,
        "honest_accused": len(tally.accused),
    }


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/zoo", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one line of JSON at the end")
    parser.add_argument("--audits", type=int, default=10_000, help="of honest nodes (default 10000)")
    parser.add_argument("--texts", type=int, default=8, help="that each cheater computes in each span (default 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="put the table into docs/verification.md")
    said = parser.parse_args()
    torch.set_num_threads(1)
    cheaters = computing(said.texts, said.seed)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        cheaters |= breaking(Path(folder))
    kinds: tuple[Numerics, ...] = ("fp32", "bf16w")
    bought = {numerics: flips(said.texts, said.seed, numerics) for numerics in kinds}
    for numerics, one in bought.items():
        say(f"an error under the tolerance on every hop, {numerics}: {one}")
    tally = honest_audits(said.audits, said.seed)
    if said.write:
        put_table(PAGE, cheaters)
    print("\n".join(lines(cheaters)))
    print(f"{tally.audits.total()} audits of honest nodes ({dict(tally.audits)}): {len(tally.accused)} accused")
    for one in tally.accused:
        print(f"accused: {one}")
    if said.json:
        print(json.dumps(report(cheaters, tally, bought)))
    return 1 if tally.accused else 0


if __name__ == "__main__":
    sys.exit(main())
