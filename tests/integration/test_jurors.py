"""Jurors as node software on a real chain: they find a case, fetch, recompute, commit, reveal, settle by themselves."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.bench_court import THOUSAND, key
from harness.jury_stage import NUM_JURORS, Trial
from tallystick.cli import main
from tallystick_protocol.chain.court import State, Verdict, Vote
from tallystick_protocol.errors import ChainError
from tallystick_protocol.keystore import create_keystore
from tallystick_protocol.receipts import Receipt
from tallystick_protocol.signing import from_words, seal
from tallystick_protocol.types import Digest, Wei


async def test_a_cheater_is_convicted_by_jurors_that_are_stopped_at_every_step(trial: Trial) -> None:
    bench, before = trial.bench, trial.bench.wealth()
    case = trial.accuse(trial.bundle(1e-2))
    jurors = [trial.juror(number) for number in range(NUM_JURORS)]
    trial.to_seed(case, lambda seats: sum(seats.values()) - min(seats.values()) >= 8)  # a quorum without the lazy one
    await trial.until(jurors, "drawing", lambda: trial.standing(case).state is State.DRAWN)
    seats = trial.seated(case)
    lazy = min(seats, key=lambda number: seats[number])
    for juror in jurors:
        juror.close()
    present = [number for number in seats if number != lazy]  # the lazy one never comes back
    jurors = [trial.juror(number) for number in present]

    # Each is stopped after its ballot was sworn and before the commitment was sent, then after it was sent.
    sent = [juror._wallet.send for juror in jurors]
    for juror in jurors:
        juror._wallet.send = _cut_off  # type: ignore[method-assign]
    await trial.until(jurors, "swearing", lambda: all(juror._ledger.rounds(case) for juror in jurors))
    sworn = [juror._ledger.ballot(case, 0) for juror in jurors]
    for juror, send in zip(jurors, sent, strict=True):
        juror._wallet.send = send  # type: ignore[method-assign]
        juror.close()
    jurors = [trial.juror(number) for number in seats if number != lazy]
    await trial.until(jurors, "committing", lambda: trial.committed(case, {lazy}))
    assert [juror._ledger.ballot(case, 0) for juror in jurors] == sworn
    for juror in jurors:
        juror.close()
    jurors = [trial.juror(number) for number in seats if number != lazy]
    trial.to_reveals(case)
    await trial.until(jurors, "revealing", lambda: all(vote for vote in trial.votes(case).values()))
    assert set(trial.votes(case).values()) == {Vote.GUILTY}
    served = jurors[0].holding.store.pins()
    assert any(cid.digest for cid in served)  # the evidence is served until the ruling

    bench.wait(43_200 + 86_400)
    await trial.until(jurors, "ruling", lambda: trial.standing(case).state is State.ENFORCED)
    assert trial.standing(case).verdict is Verdict.GUILTY
    await trial.until(jurors, "settling", lambda: all(not juror._ledger.open_cases() for juror in jurors))
    assert not jurors[0].holding.store.pins()
    after = bench.wealth()
    slashed, fine = THOUSAND // 10, seats[lazy] * THOUSAND // 2000
    share = slashed // 4 // (sum(seats.values()) - seats[lazy])
    assert after["accused"] - before["accused"] == -slashed
    assert after["accuser"] - before["accuser"] == slashed // 4
    for number in range(NUM_JURORS):
        gained = -fine if number == lazy else seats.get(number, 0) * share
        assert after[f"juror {number}"] - before[f"juror {number}"] == gained
    assert after["court"] == 0
    people = [name for name in after if name != "supply"]
    assert sum(after[name] - before[name] for name in people) == after["supply"] - before["supply"]
    for juror in jurors:
        juror.close()


def _cut_off(*_: Any) -> Any:
    raise ChainError("the process ends here")


@pytest.mark.nightly
async def test_a_false_accusation_is_cleared_and_costs_its_bond(trial: Trial) -> None:
    bench = trial.bench
    case = trial.accuse(trial.bundle(0.0))
    before = bench.wealth()
    jurors = [trial.juror(number) for number in range(NUM_JURORS)]
    await trial.until(jurors, "committing", lambda: trial.committed(case))
    trial.to_reveals(case)
    await trial.until(jurors, "revealing", lambda: all(trial.votes(case).values()))
    assert set(trial.votes(case).values()) == {Vote.CLEAR}
    bench.wait(43_200 + 86_400)
    await trial.until(jurors, "the end", lambda: all(not juror._ledger.open_cases() for juror in jurors))
    assert trial.standing(case).verdict in (Verdict.CLEAR, Verdict.MISSED)
    after = bench.wealth()
    assert after["accused"] - before["accused"] == THOUSAND // 10 // 4
    assert after["accuser"] == before["accuser"]  # the bond stayed in Court
    for juror in jurors:
        juror.close()


@pytest.mark.nightly
@pytest.mark.parametrize("what", ["malformed", "gone", "not this receipt", "not the accused's keys"])
async def test_evidence_that_cannot_be_read_is_called_so(trial: Trial, what: str) -> None:
    bundle, other = trial.bundle(1e-2), None
    if what == "malformed":
        other = bundle.encode()[:-1]
    elif what == "not this receipt":
        other = trial.bundle(2e-2).encode()
    elif what == "not the accused's keys":
        domain = trial.bench.docket.chain.book.staking_domain
        first = from_words(Receipt, bundle.sealed[0][:-65])
        accused = bundle.sealed[-1]
        other = replace(bundle, sealed=(seal(domain, first, key(950)), accused)).encode()
    case = trial.accuse(bundle, other)
    jurors = [trial.juror(number) for number in range(NUM_JURORS)]
    if what == "gone":
        for juror in jurors:
            juror._is_dialled = lambda _: False  # type: ignore[method-assign]
        await trial.until(jurors, "drawing", lambda: trial.standing(case).state is State.DRAWN)
        for _ in range(3):
            for juror in jurors:
                await juror.look()
        assert not any(juror._ledger.rounds(case) for juror in jurors)  # it may still come
        trial.bench.wait(43_200 * 3 // 4)
    await trial.until(jurors, "committing", lambda: trial.committed(case))
    assert {juror._ledger.ballot(case, 0).vote for juror in jurors if juror._ledger.rounds(case)} == {  # type: ignore[union-attr]
        Vote.UNREADABLE
    }
    for juror in jurors:
        juror.close()


@pytest.mark.nightly
async def test_what_costs_too_much_is_abstained_from(trial: Trial) -> None:
    case = trial.accuse(trial.bundle(1e-2))
    limits: list[dict[str, Any]] = [
        {"jury_positions": 32}, {"jury_seconds": 1.0, "process": True}, {"memory": 1}
    ]  # fmt: skip
    jurors = [trial.juror(number, **limits[number % 3]) for number in range(NUM_JURORS)]
    await trial.until(jurors, "drawing", lambda: trial.standing(case).state is State.DRAWN)
    trial.bench.wait(43_200 * 3 // 4)
    await trial.until(jurors, "committing", lambda: trial.committed(case))
    for juror in jurors:
        for round_ in juror._ledger.rounds(case):
            assert juror._ledger.ballot(case, round_).vote is Vote.ABSTAIN  # type: ignore[union-attr]
        juror.close()


async def test_a_person_accuses_on_the_command_line(
    trial: Trial, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = create_keystore(tmp_path / "key.json", "password", fast=True)
    (tmp_path / "password").touch(mode=0o600)
    (tmp_path / "password").write_text("password\n")
    trial.bench.local.give(address, tokens=Wei(THOUSAND))
    bundle = trial.bundle(1e-2)
    (tmp_path / "bundle").write_bytes(bundle.encode())
    (tmp_path / "broken").write_bytes(bundle.encode()[:-1])
    store = ["--store", str(tmp_path / "content")]

    async def tallystick(*arguments: str) -> tuple[int, str]:
        first = ["--rpc", trial.bench.local.rpc, "--book", str(trial.bench.local.book)]
        first += ["--key", str(tmp_path / "key.json"), "--password-file", str(tmp_path / "password")]
        status = await asyncio.to_thread(main, [*first, *arguments])
        told = capsys.readouterr()
        assert status or not told.err, told.err
        return status, told.out + told.err * status

    status, told = await tallystick("evidence", str(tmp_path / "bundle"), *store, "--json")
    about = json.loads(told)
    assert (status, about["node"], about["positions"]) == (0, trial.bench.accused.address, [32, 40])
    assert "output rows" in (await tallystick("accuse", str(tmp_path / "broken"), *store))[1]
    assert "more than" in (await tallystick("accuse", about["cid"], *store, "--max-bond", str(THOUSAND // 20 - 1)))[1]
    assert trial.bench.docket.chain.balance(trial.bench.docket.chain.court.address) == 0
    status, told = await tallystick("accuse", about["cid"], *store, "--at", trial.url, "--json")
    assert not status, told
    opened = json.loads(told)
    assert (status, opened["bond_wei"]) == (0, THOUSAND // 20)
    status, told = await tallystick("case", opened["case"])
    assert (status, json.loads(told)["state"], json.loads(told)["accuser"]) == (0, "open", address)
    assert (await tallystick("case", "0x12"))[0] == 1
    case = Digest(bytes.fromhex(opened["case"][2:]))
    (seen,) = [one for one in trial.bench.docket.openings(0, trial.bench.docket.head()[0]) if one.id == case]
    assert trial.bench.docket.sources(seen) == [trial.url]


async def test_a_case_that_a_reorganisation_moves_is_attended_all_the_same(trial: Trial) -> None:
    juror = trial.juror(0)
    bundle = trial.bundle(1e-2)
    snapshot = trial.bench.rpc("evm_snapshot")
    case = trial.accuse(bundle)
    await juror.look()
    assert [one.id for one in juror._ledger.open_cases()] == [case]
    trial.bench.rpc("evm_revert", snapshot)
    trial.bench.rpc("evm_mine")
    await juror.look()
    assert [one.id for one in juror._ledger.open_cases()] == [case]  # it may come back
    assert trial.accuse(bundle) == case
    await juror.look()
    (found,) = juror._ledger.open_cases()
    assert found in trial.bench.docket.openings(found.block, found.block)  # where it stands now
    juror.close()
