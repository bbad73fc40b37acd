"""The whole thing on real parts: anvil, the contracts, content by CID, node processes, a client without torch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import Running
from harness.waiting import eventually
from tallystick import AsyncClient, Sampling, Token
from tallystick.generation import Answer, Stream
from tallystick.routing.proven import Proven
from tallystick_protocol.types import WINDOW, Wei

PROMPT = "The function returns a list of"
TOKENS = 40


def unsharded(running: Running, prompt_ids: list[int], tokens: int) -> list[int]:
    """transformers' own greedy generate on the whole checkpoint in fp32."""
    whole = AutoModelForCausalLM.from_pretrained(
        running.checkpoint, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    ).eval()
    with torch.inference_mode():
        ids = torch.tensor([prompt_ids])
        out = whole.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
    generated: list[int] = out[0, len(prompt_ids) :].tolist()
    return generated


async def drain(stream: Stream, after: int = 0, act: Callable[[], object] | None = None) -> Answer:
    """Iterate a stream to its end; `act` runs once, after so many tokens."""
    count = 0
    async for event in stream:
        count += isinstance(event, Token)
        if act is not None and count == after:
            await asyncio.to_thread(act)
            act = None
    assert act is None, "the fault was never injected"
    return stream.answer


@pytest.fixture(scope="module")
async def honest(running: Running) -> Answer:
    """An undisturbed, fully verified answer, which others are compared with."""
    async with AsyncClient(running.key, running.net.settings()) as client:
        return await client.generate(PROMPT, max_tokens=TOKENS, model=running.id, verify="full", ignore_eos=True)


async def test_three_hops_give_the_tokens_of_the_unsharded_model(running: Running, honest: Answer) -> None:
    assert [hop.span for hop in honest.route] == running.spans
    assert honest.ids == await asyncio.to_thread(unsharded, running, honest.prompt_ids, TOKENS)
    assert honest.text and honest.finish_reason == "length"


async def test_full_verification_recomputes_every_window_of_every_span_on_other_nodes(honest: Answer) -> None:
    rows = len(honest.prompt_ids) + TOKENS - 1
    windows = -(-rows // WINDOW)
    assert honest.verdict.passed == 3 * windows and honest.verdict.failed == 0
    hops = {hop.node for hop in honest.route}
    assert hops == {check.node for check in honest.verdict.checks}
    assert not hops & {check.auditor for check in honest.verdict.checks}
    assert honest.verdict.receipts == 3 * windows


async def test_a_verified_answer_proves_its_class_to_whoever_shares_the_clients_memory(
    running: Running, honest: Answer
) -> None:
    remembered = Proven(running.net.settings().cache / "classes.json")
    assert honest.verdict.unproven == [] and honest.verdict.checked
    assert all(remembered.counts(hop.offer.numeric_class) for hop in honest.route)


async def test_every_node_is_paid_for_the_rows_it_computed_and_nothing_is_withheld(
    running: Running, honest: Answer
) -> None:
    rows = len(honest.prompt_ids) + TOKENS - 1
    for hop in honest.route:
        units = hop.span.units(running.manifest.layers)
        assert honest.verdict.paid[hop.node] == rows * units * hop.offer.price
    assert not any(honest.verdict.withheld.values())


async def test_a_killed_node_is_replaced_and_the_tokens_are_unchanged(running: Running, honest: Answer) -> None:
    for hop in range(3):
        async with AsyncClient(running.key, running.net.settings()) as client:
            stream = client.stream(PROMPT, max_tokens=TOKENS, model=running.id, verify="off", ignore_eos=True)
            victims: list[str] = []

            def kill(stream: Stream = stream, hop: int = hop, victims: list[str] = victims) -> None:
                node = running.node(stream.session_route[hop].node)
                node.process.kill()
                victims.append(node.address)

            answer = await drain(stream, after=7 + hop, act=kill)
        assert answer.ids == honest.ids, f"hop {hop} was killed"
        assert [lost for lost, _, _ in answer.verdict.replaced] == victims
        assert victims[0] not in {candidate.node for candidate in answer.route}
    await asyncio.to_thread(running.revive)


async def test_sampling_with_a_seed_is_the_same_after_a_failover(running: Running) -> None:
    sampling = Sampling(temperature=0.9, top_p=0.95, seed=7)
    async with AsyncClient(running.key, running.net.settings()) as client:
        quiet = await client.generate(
            PROMPT, max_tokens=TOKENS, sampling=sampling, model=running.id, verify="off", ignore_eos=True
        )
        stream = client.stream(
            PROMPT, max_tokens=TOKENS, sampling=sampling, model=running.id, verify="off", ignore_eos=True
        )
        kill = lambda: running.node(stream.session_route[1].node).process.kill()  # noqa: E731
        disturbed = await drain(stream, after=11, act=kill)
    assert disturbed.ids == quiet.ids
    await asyncio.to_thread(running.revive)


async def test_a_long_prompt_is_served_within_the_nodes_credit(running: Running) -> None:
    prompt = [1] + [5 + i % 200 for i in range(399)]
    async with AsyncClient(running.key, running.net.settings()) as client:
        answer = await drain(client.stream(prompt, max_tokens=4, model=running.id, verify="full", ignore_eos=True))
    assert answer.ids == await asyncio.to_thread(unsharded, running, prompt, 4)
    assert answer.verdict.failed == 0 and answer.verdict.passed == 3 * 13


async def test_concurrent_sessions_of_one_client_do_not_disturb_each_other(running: Running, honest: Answer) -> None:
    async with AsyncClient(running.key, running.net.settings()) as client:
        answers = await asyncio.gather(
            *(
                client.generate(PROMPT, max_tokens=TOKENS, model=running.id, verify="off", ignore_eos=True)
                for _ in range(4)
            )
        )
    assert all(answer.ids == honest.ids for answer in answers)
    assert all(not any(answer.verdict.withheld.values()) for answer in answers)


async def test_a_stopped_node_redeems_and_its_payee_gets_what_the_vouchers_promised(running: Running) -> None:
    chain = running.net.chain.chain()
    async with AsyncClient(running.key, running.net.settings()) as client:
        answer = await client.generate(PROMPT, max_tokens=8, model=running.id, verify="off", ignore_eos=True)
    node = running.node(answer.route[0].node)
    before = await asyncio.to_thread(chain.balance, node.address)
    paid_before = (await asyncio.to_thread(chain.funds, running.key.address, node.address)).paid
    await asyncio.to_thread(node.process.stop)
    paid_after = (await asyncio.to_thread(chain.funds, running.key.address, node.address)).paid
    redeemed = paid_after - paid_before
    assert redeemed >= answer.verdict.paid[node.address] > 0
    fee = redeemed * 500 // 10_000
    await eventually("the payee's balance", lambda: chain.balance(node.address) == Wei(before + redeemed - fee))
    await asyncio.to_thread(running.revive)


async def test_the_stream_stops_when_its_reader_leaves(running: Running) -> None:
    async with AsyncClient(running.key, running.net.settings()) as client:
        stream = client.stream(PROMPT, max_tokens=200, model=running.id, verify="off", ignore_eos=True)
        count = 0
        async for _ in stream:
            count += 1
            if count == 5:
                break
        route = stream.session_route
        await stream.aclose()

        async def idle() -> bool:
            infos = [await client._peers.info(hop.url) for hop in route]
            return all(info["status"]["sessions"] == 0 for info in infos)

        deadline = asyncio.get_running_loop().time() + 10
        while not await idle():
            assert asyncio.get_running_loop().time() < deadline, "waited for the nodes to drop the session"
            await asyncio.sleep(0.05)
