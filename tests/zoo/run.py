"""The zoo of cheaters: who is caught by what, after how many audits, and whether an honest node is ever accused."""

from __future__ import annotations

import argparse
import json
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
from zoo.cheaters import measure
from zoo.honest import Tally, honest_audits
from zoo.protocol import SCENARIOS, perform
from zoo.table import lines, put_table, to_99

PAGE = repository() / "docs" / "verification.md"


def computing(texts: int, seed: int) -> dict[str, dict[str, Any]]:
    """Nodes that compute wrongly."""
    found = measure(texts, seed, say=say)
    return {
        name: {
            "what": COMPUTING[name].what,
            "check": "`hash`",
            "detected": one.detected,
            "detected_across_classes": None,
            "audits": one.audits,
            "audits_to_99": to_99(one.detected),
            "audits_to_99_across_classes": None,
        }
        for name, one in found.items()
    }


def breaking(folder: Path) -> dict[str, dict[str, Any]]:
    """Nodes that break the protocol. What no audit is needed for is found after none, in whatever class."""
    rows, models = {}, Models()
    try:
        for name, scenario in SCENARIOS.items():
            outcome = perform(models, scenario, folder / name)
            caught = float(scenario.check in outcome.checks and not outcome.innocent)
            say(f"{name}: {', '.join(sorted(outcome.checks)) or outcome.error or 'nothing'}")
            audits = int(scenario.audits) if caught else None
            rows[name] = {
                "what": " and ".join(BREAKING[part].what for part in scenario.who.values()),
                "check": f"`{scenario.check}`",
                "detected": caught,
                "detected_across_classes": None if scenario.audits else caught,
                "audits": audits,
                "audits_to_99": audits,
                "audits_to_99_across_classes": None if scenario.audits else audits,
            }
    finally:
        models.close()
    return rows


def report(cheaters: dict[str, dict[str, Any]], tally: Tally) -> dict[str, Any]:
    told = ("detected", "detected_across_classes", "audits_to_99", "audits_to_99_across_classes")
    return {
        "cheaters": {name: {key: one[key] for key in told} for name, one in cheaters.items()},
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
    with tempfile.TemporaryDirectory() as folder:
        cheaters |= breaking(Path(folder))
    tally = honest_audits(said.audits, said.seed)
    if said.write:
        put_table(PAGE, cheaters)
    print("\n".join(lines(cheaters)))
    print(f"{tally.audits.total()} audits of honest nodes ({dict(tally.audits)}): {len(tally.accused)} accused")
    for one in tally.accused:
        print(f"accused: {one}")
    if said.json:
        print(json.dumps(report(cheaters, tally)))
    return 1 if tally.accused else 0


if __name__ == "__main__":
    sys.exit(main())
