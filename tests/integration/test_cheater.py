"""A node that computes wrongly: caught by the check, named by a third node, replaced, not paid."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from conftest import Running
from tallystick import AsyncClient, Retracted, Token
from tallystick.court.accusing import load_evidence
from tallystick_devnet.demo import cheating_command
from tallystick_devnet.localnet import READY_TIMEOUT_S
from tallystick_node.config import NodeConfig
from tallystick_node.jury.judging import judge
from tallystick_node.jury.recompute import examine
from tallystick_protocol.chain.court import Vote
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.evidence.recomputing import Job

PROMPT = "The function returns a list of"
TOKENS = 40


async def test_a_cheater_is_named_by_two_others_replaced_and_not_paid(running: Running, tmp_path: Path) -> None:
    chain = running.net.chain.chain()
    async with AsyncClient(running.key, running.net.settings()) as client:
        honest = await client.generate(PROMPT, max_tokens=TOKENS, model=running.id, verify="off", ignore_eos=True)
    cheater = running.node(honest.route[1].node)
    await asyncio.to_thread(cheater.process.stop)
    cheap = ["--price", str(honest.route[1].offer.price // 2)]
    running.net.restart(cheater, running.model, cheating_command(), cheap)
    try:
        await asyncio.to_thread(cheater.process.wait_for, "fault: row", READY_TIMEOUT_S)
        await asyncio.to_thread(cheater.wait)
        paid_before = (await asyncio.to_thread(chain.funds, running.key.address, cheater.address)).paid
        async with AsyncClient(running.key, replace(running.net.settings(), evidence=tmp_path / "evidence")) as client:
            stream = client.stream(PROMPT, max_tokens=TOKENS, model=running.id, verify="full", ignore_eos=True)
            events = [event async for event in stream]
            answer = stream.answer
            assert client.banned == {cheater.address}
        accusation = answer.verdict.accusations[0]
        assert accusation.node == cheater.address and accusation.span == cheater.span
        assert len(set(accusation.witnesses)) == 2 and cheater.address not in accusation.witnesses
        _is_guilty_to_a_juror(running, accusation.evidence, tmp_path)
        assert answer.ids == honest.ids, "the answer was completed through an honest node"
        assert cheater.address not in {hop.node for hop in answer.route}
        assert answer.verdict.paid[cheater.address] == 0 and answer.verdict.withheld[cheater.address] >= 0
        assert text_of(events) == honest.text, "a reader who honours retractions has the right text"
    finally:
        await asyncio.to_thread(cheater.process.stop)
        running.net.restart(cheater, running.model)
        await asyncio.to_thread(cheater.wait)
    paid_after = (await asyncio.to_thread(chain.funds, running.key.address, cheater.address)).paid
    assert paid_after == paid_before, "the contract paid the cheater nothing for it"


async def test_a_cheating_auditor_is_found_out_and_the_honest_hop_is_kept_and_paid(running: Running) -> None:
    async with AsyncClient(running.key, running.net.settings()) as client:
        honest = await client.generate(PROMPT, max_tokens=TOKENS, model=running.id, verify="off", ignore_eos=True)
    middle = [node for node in running.nodes if node.span == running.spans[1]]
    hop = honest.route[1].node
    liar = next(node for node in middle if node.address != hop)
    await asyncio.to_thread(liar.process.stop)
    running.net.restart(liar, running.model, cheating_command(), ["--price", str(2 * honest.route[1].offer.price)])
    try:
        await asyncio.to_thread(liar.process.wait_for, "fault: row", READY_TIMEOUT_S)
        await asyncio.to_thread(liar.wait)
        for _ in range(24):  # one of two is drawn at random each time: until the liar is
            async with AsyncClient(running.key, running.net.settings()) as client:
                answer = await client.generate(
                    PROMPT, max_tokens=TOKENS, model=running.id, verify="full", ignore_eos=True
                )
            assert answer.ids == honest.ids
            if answer.verdict.accusations:
                break
        else:
            raise AssertionError("the liar was never drawn as the auditor")
        assert [accusation.node for accusation in answer.verdict.accusations] == [liar.address]
        assert answer.route[1].node != liar.address
        assert answer.verdict.paid[answer.route[1].node] > 0
        assert answer.verdict.paid.get(liar.address, 0) == 0
    finally:
        await asyncio.to_thread(liar.process.stop)
        running.net.restart(liar, running.model)
        await asyncio.to_thread(liar.wait)


def _is_guilty_to_a_juror(running: Running, cid: str, folder: Path) -> None:
    """The evidence that the client gathered, recomputed on the published pieces and nothing else."""
    chain = running.net.chain.chain()
    domain = chain.book.staking_domain
    evidence, _ = load_evidence(cid, LocalStore(folder / "evidence"), domain)
    assert evidence.bundle.outputs is not None, "the accused gave its rows"
    content = LocalStore(running.net.folder / "content")
    (folder / "bundle").write_bytes(evidence.bundle.encode())
    (folder / "manifest").write_bytes(running.manifest.to_bytes())
    pieces = {}
    for piece in running.manifest.span_pieces(evidence.accused.span):
        content.read_file(piece.cid, folder / str(piece.cid), piece.bytes)
        pieces[str(piece.cid)] = str(folder / str(piece.cid))
    classes = NodeConfig.model_fields["class_cache"].default.expanduser()
    job = Job(
        str(folder / "bundle"), evidence.digest.hex(), str(folder / "manifest"), pieces, domain.chain_id,
        domain.contract, str(classes), 1, 0,
    )  # fmt: skip
    found = examine(job)
    assert judge(found) is Vote.GUILTY, found


def text_of(events: list[Token | Retracted]) -> str:
    text = ""
    for event in events:
        text = text + event.text if isinstance(event, Token) else text[: len(text) - event.num_characters]
    return text
