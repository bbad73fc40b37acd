"""Appeals by node software on a real chain: a jury that lies is overruled, and nobody appeals against the truth."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from harness.bench_court import THOUSAND
from harness.jury_stage import NUM_JURORS, Trial
from tallystick.cli import main
from tallystick_node.jury.judging import Finding
from tallystick_node.jury.juror import Juror
from tallystick_protocol.chain.court import State, Verdict, Vote
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.errors import ChainError
from tallystick_protocol.keystore import create_keystore
from tallystick_protocol.types import Digest, Wei

REVEAL, APPEAL = 43_200, 86_400
BOND = THOUSAND // 20
LIES = {
    Vote.GUILTY: Finding(same_class=True, error=1.0, clear=1e-6, guilty=1e-4),
    Vote.CLEAR: Finding(same_class=True, equal=True, clear=1e-6, guilty=1e-4),
}


def jury(trial: Trial, lie: Vote | None = None, **settings: Any) -> list[Juror]:
    """All jurors; with a lie each finds that, whatever it computes."""
    found = [trial.juror(number, **settings) for number in range(NUM_JURORS)]

    async def lying(_: Any) -> Finding:
        assert lie is not None
        return LIES[lie]

    for juror in found if lie else []:
        juror._in_a_process = lying  # type: ignore[method-assign]
    return found


def accused(trial: Trial, **settings: Any) -> Juror:
    """The accused's own node; its hot key pays."""
    bench = trial.bench
    return trial.node(bench.accused.address, Wallet(bench.docket.chain, bench.hot), "accused", **settings)


async def vote(trial: Trial, case: Digest, nodes: list[Juror], say: Vote) -> None:
    """A round, up to the time of appeals; chain time is moved only where everybody has done what is due."""
    trial.to_seed(case)
    await trial.until(nodes, "committing", lambda: trial.committed(case))
    trial.to_reveals(case)
    await trial.until(nodes, "revealing", lambda: all(trial.votes(case, trial.standing(case).round).values()))
    assert set(trial.votes(case, trial.standing(case).round).values()) == {say}
    trial.bench.wait(REVEAL)


def by(trial: Trial, case: Digest, round_: int = 0) -> str:
    return trial.bench.docket.appealed(case, round_).by


async def test_the_accused_has_a_lying_jury_overruled_and_is_stopped_at_every_step(trial: Trial) -> None:
    bench = trial.bench
    bench.local.give(bench.hot.address, tokens=Wei(2 * BOND))
    case, before = trial.accuse(trial.bundle(0.0)), bench.wealth()
    liars, node = jury(trial, Vote.GUILTY), accused(trial)
    await vote(trial, case, [*liars, node], Vote.GUILTY)
    assert node._ledger.finding(case) is not None  # it did not wait for the verdict

    # Killed after the bond was entered and before it was sent, then after it was sent.
    node._wallet.appeal = _cut_off  # type: ignore[method-assign]
    await node.look()
    assert node._ledger.pledges(case) == [0] and int(by(trial, case), 16) == 0
    node.close()
    node = accused(trial)
    await node.look()
    assert by(trial, case) == bench.hot.address
    assert trial.standing(case).round == 1
    node.close()
    node = accused(trial)
    for _ in range(3):
        await node.look()
    assert bench.docket.chain.balance(bench.hot.address) == 0
    assert node._ledger.pledges(case) == [0]

    for one in liars:
        one.close()
    (trial.folder / "honest").mkdir()
    honest = [
        trial.node(wallet.address, wallet, f"honest/{number}") for number, wallet in enumerate(bench.jurors)
    ]  # fmt: skip
    await vote(trial, case, [*honest, node], Vote.CLEAR)
    for _ in range(2):
        await node.look()
    assert trial.standing(case).round == 1  # what is right is not appealed against
    bench.wait(APPEAL)
    nodes = [*honest, node]
    await trial.until(nodes, "the end", lambda: not any(one._ledger.open_cases() for one in nodes))
    assert trial.standing(case).verdict is Verdict.CLEAR
    assert bench.docket.chain.balance(bench.hot.address) == 2 * BOND
    assert node._ledger.pledges(case) == []
    after = bench.wealth()
    assert after["accused"] - before["accused"] == BOND // 2  # not slashed, and half of the accuser's bond
    for one in nodes:
        one.close()


def _cut_off(*_: Any) -> Any:
    raise ChainError("the process ends here")


async def test_where_a_node_may_not_or_cannot_pay_a_person_appeals_on_the_command_line(
    trial: Trial, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    bench, name = trial.bench, ""

    async def tallystick(*arguments: str) -> tuple[int, str]:
        first = ["--rpc", bench.local.rpc, "--book", str(bench.local.book)]
        first += ["--key", str(tmp_path / "key.json"), "--password-file", str(tmp_path / "password")]
        status = await asyncio.to_thread(main, [*first, *arguments])
        told = capsys.readouterr()
        return status, told.out + told.err * status

    address = create_keystore(tmp_path / "key.json", "password", fast=True)
    (tmp_path / "password").touch(mode=0o600)
    (tmp_path / "password").write_text("password\n")
    case = trial.accuse(trial.bundle(0.0))
    name = "0x" + case.hex()
    assert "the case is open" in (await tallystick("appeal", name))[1]
    liars, node = jury(trial, Vote.GUILTY), accused(trial)
    trial.to_seed(case)
    await trial.until([*liars, node], "committing", lambda: trial.committed(case))
    assert "appeals are made from" in (await tallystick("appeal", name))[1]
    trial.to_reveals(case)
    await trial.until([*liars, node], "revealing", lambda: all(trial.votes(case).values()))
    bench.wait(REVEAL)

    await node.look()
    await node.look()
    assert caplog.text.count(f"holds 0 of the {2 * BOND} token units") == 1  # once, though it is due at every look
    bench.local.give(bench.hot.address, address, tokens=Wei(2 * BOND))
    for budget, told in [(2 * BOND - 1, "more than the budget"), (0, "")]:
        node.close()
        (trial.folder / "accused" / "jury.db").unlink()
        caplog.clear()
        node = accused(trial, appeal_max=budget)
        await trial.until([node], "recomputing", lambda: node._ledger.finding(case) is not None)  # noqa: B023
        await node.look()
        assert (told in caplog.text) if told else "no appeal" not in caplog.text
    assert int(by(trial, case), 16) == 0

    shown = json.loads((await tallystick("case", name))[1])
    assert (shown["votes_say"], shown["appeal_bond_wei"]) == ("guilty", 2 * BOND)
    assert shown["appeal_from"] <= bench.docket.head()[1] < shown["appeal_until"]
    assert "more than" in (await tallystick("appeal", name, "--max-bond", str(2 * BOND - 1)))[1]
    status, told = await tallystick("appeal", name, "--json")
    assert (status, json.loads(told)) == (0, {"round": 0, "against": "guilty", "bond_wei": 2 * BOND})
    assert by(trial, case) == address
    for one in [*liars, node]:
        one.close()


@pytest.mark.nightly
async def test_a_juror_with_a_budget_appeals_for_what_it_voted_when_no_party_did(trial: Trial) -> None:
    """Two of three are bought; the third has voted guilty, with less than a third of the seats."""
    bench = trial.bench
    case = trial.accuse(trial.bundle(1e-2))
    bought = jury(trial, Vote.CLEAR)
    trial.to_seed(case, lambda seats: len(seats) == NUM_JURORS and 3 * min(seats.values()) <= sum(seats.values()))
    await trial.until(bought, "drawing", lambda: trial.standing(case).state is State.DRAWN)
    seats = trial.seated(case)
    witness = min(seats, key=lambda number: seats[number])
    bought[witness].close()
    bought[witness] = trial.node(
        bench.jurors[witness].address, bench.jurors[witness], "witness", jury_appeal_max=2 * BOND
    )
    await trial.until(bought, "committing", lambda: trial.committed(case))
    trial.to_reveals(case)
    await trial.until(bought, "revealing", lambda: all(trial.votes(case).values()))
    bench.wait(REVEAL)
    assert bench.docket.verdict_so_far(case) is Verdict.CLEAR
    for one in bought * 2:
        await one.look()
    assert int(by(trial, case), 16) == 0  # parties first
    bench.wait(APPEAL // 2)
    await trial.until(bought, "appealing", lambda: trial.standing(case).round == 1)
    assert by(trial, case) == bench.jurors[witness].address
    for one in bought:
        one.close()
