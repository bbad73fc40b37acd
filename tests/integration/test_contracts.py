"""The contracts at night: every mutant killed, many more runs of what is fuzzed, on another seed each day."""

from __future__ import annotations

import os
import shutil
import subprocess
from datetime import date

import pytest

from tallystick_devnet.localchain import repository

ROOT = repository()


@pytest.mark.nightly
def test_every_mutant_is_killed() -> None:
    done = subprocess.run([ROOT / "scripts" / "mutate"], capture_output=True, text=True, check=False)
    survived = [line for line in done.stdout.splitlines() if "SURVIVED" in line]
    assert done.returncode == 0, "\n".join([*survived, done.stdout[-500:], done.stderr[-500:]])


@pytest.mark.nightly
def test_forty_times_as_many_runs_find_nothing() -> None:
    path = f"{ROOT}/.venv/bin:{os.environ['PATH']}"
    node = shutil.which("node", path=path)
    assert node is not None, "Node.js is not installed; run scripts/install"
    day = f"0x{date.today().toordinal():064x}"
    environment = os.environ | {"TALLYSTICK_FUZZ_FACTOR": "40", "TALLYSTICK_FUZZ_SEED": day}
    command = [node, "node_modules/hardhat/dist/src/cli.js", "test", "solidity"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"seed {day}: {done.stdout[-3000:]}{done.stderr[-500:]}"
