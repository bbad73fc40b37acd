"""`scripts/trial`: nine nodes, one of which cheats and one is lazy, a false accuser; all figures are the chain's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tallystick.client import AsyncClient
from tallystick.court.accusing import Accused, accuse, load_evidence
from tallystick.court.keeping import keep_evidence
from tallystick.session.auditing import Disagreement
from tallystick.session.evidence import gather
from tallystick.session.session import Session
from tallystick_devnet.demo import cheating_command, default_model
from tallystick_devnet.localchain import ETHER
from tallystick_devnet.localnet import READY_TIMEOUT_S, LocalNet, thirds
from tallystick_devnet.trial.money import Wealth, wealth
from tallystick_devnet.trial.stage import JUROR_SETTINGS, Stage
from tallystick_protocol.chain.court import Verdict, Vote
from tallystick_protocol.chain.docket import Docket
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.errors import CorruptResult
from tallystick_protocol.evidence.checking import read_evidence
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.signing import Key
from tallystick_protocol.types import Address, Digest, ModelId, Wei

STAKE = Wei(10_000 * ETHER)
EPOCH_S = 86_400
PUBLIC_TEXT = "The function returns a list of"
TOKENS = 40
KILLS = 2


def run_trial(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Run it all in `folder`; returns the JSON object. Everything it starts is stopped when it returns or raises."""
    began = time.monotonic()
    with LocalNet(folder, say, stake=STAKE) as net:
        model, manifest = net.publish(default_model())
        stage, cheater = _set_up(net, model, manifest, say)
        (honest_key, _), (false_key, _) = net.client_key("client"), net.client_key("false-accuser")
        people = {node.name: node.address for node in net.nodes}
        people |= {"client": honest_key.address, "false accuser": false_key.address}
        nodes = [node.name for node in net.nodes]
        stage.wait(EPOCH_S)  # the jurors' stakes count from the next epoch on
        before = wealth(stage.docket.chain, people, nodes)

        say("\n1. a spot check with a public text, every span recomputed; who is found wrong is accused\n")
        case = asyncio.run(_spot_check(net, honest_key))
        found = _told(stage, people, case)
        stage.choose_lazy(found, {cheater, *_first_hops(net)})
        stage.try_case(found, KILLS)
        after_first = wealth(stage.docket.chain, people, nodes)

        say("\n2. somebody accuses a node that did nothing wrong\n")
        case, victim = asyncio.run(_accuse_falsely(net, false_key))
        false = _told(stage, people, case)
        stage.try_case(false, 0)
        after = wealth(stage.docket.chain, people, nodes)

        result = _result(stage, people, cheater, victim, [found, false], [before, after_first, after])
        result["seconds"] = round(time.monotonic() - began, 1)
        _print(stage, people, [found, false], before, after)
        return result


def _set_up(net: LocalNet, model: ModelId, manifest: Manifest, say: Callable[[str], None]) -> tuple[Stage, str]:
    first, middle, last = thirds(manifest.layers)
    spans = [first, first, last, last, middle, middle, middle, middle, middle]
    say(f"starting {len(spans)} nodes with {STAKE // ETHER} tokens at stake each; the last one cheats")
    net.prepare(len(spans))
    for span in spans[:-1]:
        net.add_node(model, span, settings=JUROR_SETTINGS)
    cheating = net.add_node(model, middle, cheating_command(), [*JUROR_SETTINGS, "--price", str(5 * 10**11)])
    for node in net.nodes:
        node.wait()
        say(f"  {node.name} {node.address} serves layers {node.span}")
    cheating.process.wait_for("fault: row", READY_TIMEOUT_S)
    stage = Stage(net, model, Docket(net.chain.chain()), say)
    stage.commands[cheating.name] = cheating_command()
    return stage, cheating.name


def _first_hops(net: LocalNet) -> set[str]:
    """One of these is accused later."""
    return {node.name for node in net.nodes if node.span.start == 0}


def _told(stage: Stage, people: dict[str, Address], case: Accused) -> Digest:
    """Say who accuses whom of what, with which evidence; the case's id."""
    names, standing = {address: name for name, address in people.items()}, stage.standing(case.id)
    evidence, _ = load_evidence(
        str(case.cid), LocalStore(stage.net.folder / "content"), stage.docket.chain.book.staking_domain
    )
    accused, outputs = evidence.accused, "with" if evidence.bundle.outputs is not None else "without"
    stage.say(
        f"  {names[standing.accuser]} accuses {names[standing.accused]} of positions {accused.positions} through layers"
        f" {accused.span}, for a bond of {case.bond / 1e18:,.4f}; evidence {case.cid}, {len(evidence.receipts)}"
        f" receipts, {len(evidence.bundle.encode())} bytes, {outputs} the rows that left"
    )
    return case.id


async def _spot_check(net: LocalNet, key: Key) -> Accused:
    """An answer under `full`, with evidence kept in the store that jurors ask. The case that it has led to."""
    settings = replace(
        net.settings(),
        evidence=net.folder / "content",
        evidence_sources=[net.source],
        cache=net.folder / "cache1",
    )
    async with AsyncClient(key, settings) as client:
        answer = await client.generate(PUBLIC_TEXT, max_tokens=TOKENS, verify="full", ignore_eos=True)
        cases = await client.accuse(answer.verdict)
    if len(cases) != 1:
        raise CorruptResult(f"{len(cases)} cases were opened where one node cheats: {answer.verdict.accusations}")
    return cases[0]


async def _accuse_falsely(net: LocalNet, key: Key) -> tuple[Accused, Address]:
    """An honest first hop's last receipt, with the ids that entered it."""
    settings = replace(net.settings(), cache=net.folder / "c2")
    async with AsyncClient(key, settings) as client:
        stream = client.stream(PUBLIC_TEXT, max_tokens=TOKENS, verify="off", ignore_eos=True)
        async for _ in stream:
            pass
        session = stream._session
        assert isinstance(session, Session)
        receipt = session.hops[0].standing.receipts[-1]
        window = len(session.hops[0].standing.receipts) - 1
        data = await gather(session, 0, Disagreement(window, receipt, receipt))
    chain = net.chain.chain()
    cid = keep_evidence(LocalStore(net.folder / "content"), data)
    evidence = read_evidence(chain.book.staking_domain, data)
    opened = await asyncio.to_thread(accuse, Wallet(chain, key), evidence, cid, [net.source])
    return opened, receipt.node


def _result(
    stage: Stage, people: dict[str, Address], cheater: str, victim: Address, cases: list[Digest], told: list[Wealth]
) -> dict[str, Any]:
    before, between, after = told
    slashed = before.stake[cheater] - between.stake[cheater]
    lost = before.of("false accuser") - after.of("false accuser")
    honest = [name for name in before.stake if name not in (cheater, stage.lazy)]
    return {
        "cheater": {"node": people[cheater], "verdict": _verdict(stage, cases[0]), "slashed_wei": slashed},
        "accuser": {"verdict": _verdict(stage, cases[1]), "accused": victim, "bond_lost_wei": lost},
        "juror": {"node": people[stage.lazy], "penalty_wei": before.stake[stage.lazy] - after.stake[stage.lazy]},
        "client_gained_wei": between.of("client") - before.of("client"),
        "honest_slashed": sum(max(before.stake[name] - after.stake[name], 0) for name in honest),
        "honest_whole": all(after.of(name) >= before.of(name) for name in honest),
        "burned_wei": before.supply - after.supply,
        "killed": stage.killed,
        "conserved": all(each.adds_up for each in told) and not after.contracts["Court"],
    }


def _verdict(stage: Stage, case: Digest) -> str:
    return stage.standing(case).verdict.name.lower()


def _print(stage: Stage, people: dict[str, Address], cases: list[Digest], before: Wealth, after: Wealth) -> None:
    console, names = Console(), {address: name for name, address in people.items()}
    for case in cases:
        standing = stage.standing(case)
        table = Table(
            title=f"case 0x{case.hex()[:12]}: {names[standing.accuser]} against {names[standing.accused]},"
            f" {Verdict(standing.verdict).name.lower()}"
        )
        for column in ("round", "juror", "seats", "vote", "recomputed error", "guilty above"):
            table.add_column(column)
        for round_ in range(standing.round + 1):
            ballots = stage.ballots(case, round_)
            for name, count in stage.seats(case, round_).items():
                found, ballot = stage.finding(name, case), ballots.get(name)
                vote = Vote(ballot.vote).name.lower() if ballot is not None and ballot.vote else "silent"
                error = "-" if found is None or found.error is None else f"{found.error:.3g}"
                bound = "-" if found is None else f"{found.guilty:.3g}"
                table.add_row(str(round_), name, str(count), vote, error, bound)
        console.print(table)
    table = Table(title="where every token went (what is in channels is its client's)")
    for column in ("who", "before", "after", "change"):
        table.add_column(column, justify="right" if column != "who" else "left")
    for name in after.hand:
        table.add_row(name, *(f"{value / 1e18:,.6f}" for value in (
            before.of(name), after.of(name), after.of(name) - before.of(name))))  # fmt: skip
    for name in after.contracts:
        old, new = before.contracts[name], after.contracts[name]
        table.add_row(
            f"({name})" if name == "Escrow" else name,
            f"{old / 1e18:,.6f}",
            f"{new / 1e18:,.6f}",
            f"{(new - old) / 1e18:,.6f}",
        )
    burned = after.supply - before.supply
    table.add_row("in all", f"{before.supply / 1e18:,.6f}", f"{after.supply / 1e18:,.6f}", f"{burned / 1e18:,.6f}")
    console.print(table)
