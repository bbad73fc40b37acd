"""The Court end to end: `scripts/trial` runs it all, and its last line adds up."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tallystick_devnet.localchain import ETHER, repository


@pytest.mark.nightly
def test_the_cheater_the_false_accuser_and_the_lazy_juror_pay_and_nobody_else() -> None:
    command = [sys.executable, "-m", "tallystick_devnet.cli", "trial", "--json"]
    done = subprocess.run(command, cwd=repository(), capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    stake = 10_000 * ETHER
    assert (result["cheater"]["verdict"], result["cheater"]["slashed_wei"]) == ("guilty", stake // 100)
    assert (result["accuser"]["verdict"], result["accuser"]["bond_lost_wei"]) == ("clear", stake // 200)
    assert result["juror"]["penalty_wei"] > 0
    assert result["juror"]["penalty_wei"] % (ETHER // 2) == 0
    assert result["client_gained_wei"] == stake // 400
    assert result["honest_slashed"] == 0
    assert result["honest_whole"]
    assert result["conserved"]
    assert len(result["killed"]) >= 2
