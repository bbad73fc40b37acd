"""Passes asked of a real node by a client that means harm: every refusal has its code, and the node serves on."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from conftest import Running
from harness.raw_session import Attacker, RawSession, Target
from tallystick_devnet.localchain import rich_key
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.frames import DType, Frame, Kind
from tallystick_protocol.passes import tensor_frames
from tallystick_protocol.signing import Key
from tallystick_protocol.types import WINDOW, Wei

WIDTH, VOCAB = 192, 4096
LINEAR = "model.layers.2.self_attn.q_proj"
DOWN = "model.layers.2.mlp.down_proj"
ROWS = np.ones((5, WIDTH), np.float32)


@pytest.fixture(scope="module")
async def attacker(running: Running) -> AsyncIterator[Attacker]:
    """A client with money at the node of the middle span."""
    made = Attacker(running.net.chain.chain(), Key(secrets.token_bytes(32)), running.manifest.layers)
    yield made
    await made.close()


@pytest.fixture(scope="module")
async def middle(running: Running, attacker: Attacker) -> Target:
    target = await attacker.target(running.nodes[1].url)
    fund(attacker, target, attacker.key, Wei(10**18))
    return target


def fund(attacker: Attacker, target: Target, key: Key, amount: Wei) -> None:
    wallet, chain = Wallet(attacker.chain, rich_key()), attacker.chain
    wallet.send("approving", chain.token.functions.approve(chain.escrow.address, amount))
    wallet.send("funding", chain.escrow.functions.fund(key.address, [(target.node, amount)]))


async def put(session: RawSession, request: int, **tensors: np.ndarray) -> None:
    for name, values in tensors.items():
        for frame in tensor_frames(request, name.replace("__", "."), values):
            await session.send(frame)


async def forward_works(session: RawSession) -> bool:
    """Whether an honest forward pass is answered as it should be."""
    await put(session, 1 << 20, rows=ROWS)
    error = await session.command(Kind.FORWARD, {"request": 1 << 20})
    answer = await session.next(Kind.TENSOR)
    return error is None and answer.body["name"] == "rows" and answer.shape == (1, 5, WIDTH)


@asynccontextmanager
async def opened(attacker: Attacker, target: Target) -> AsyncIterator[RawSession]:
    """A session that is shown to work when it ends: nothing that was refused has broken it."""
    async with attacker.open(target, top_k=0) as session:
        yield session
        assert await forward_works(session)
        await session.send(attacker.voucher(target, session.owed + target.cost(10**6)))


def frame(name: Any, rows: Any, values: np.ndarray, position: int = 0) -> Frame:
    """One TENSOR frame that says what it likes."""
    dtype = DType.F32 if values.dtype.kind == "f" else DType.IDS
    shape = (1, *values.shape)
    return Frame(Kind.TENSOR, {"request": 1, "name": name, "rows": rows}, position, dtype, shape, values.tobytes())


F = np.float32
BAD_TENSORS: dict[str, tuple[Frame, str]] = {
    "NaN": (frame("rows", 2, np.full((2, WIDTH), np.nan, F)), "bad_tensor"),
    "infinite gradients": (frame("grad", 1, np.full((1, WIDTH), np.inf, F)), "bad_tensor"),
    "another width": (frame("rows", 2, np.ones((2, WIDTH + 1), F)), "bad_tensor"),
    "ids in the middle": (frame("rows", 2, np.ones((2, 1), np.uint32)), "bad_tensor"),
    "no such module": (frame("model.layers.2.nothing.lora_A", 2, np.ones((2, WIDTH), F)), "bad_tensor"),
    "another span's module": (frame("model.layers.0.self_attn.q_proj.lora_A", 2, np.ones((2, WIDTH), F)), "bad_tensor"),
    "the head": (frame("lm_head.lora_A", 2, np.ones((2, WIDTH), F)), "bad_tensor"),
    "an absurd rank": (frame(LINEAR + ".lora_A", 65, np.ones((65, WIDTH), F)), "bad_tensor"),
    "an absurd rank of B": (frame(LINEAR + ".lora_B", WIDTH, np.ones((2, 4000), F)), "bad_tensor"),
    "rows without end": (frame("rows", 1 << 60, np.ones((1, WIDTH), F)), "context_length_exceeded"),
    "no rows": (frame("rows", 0, np.ones((1, WIDTH), F)), "context_length_exceeded"),
    "more than announced": (frame("rows", 1, np.ones((2, WIDTH), F)), "bad_position"),
    "out of order": (frame("rows", 9, np.ones((2, WIDTH), F), position=3), "bad_position"),
    "a name without end": (frame("x" * 5000, 2, np.ones((2, WIDTH), F)), "bad_tensor"),
    "a name of another type": (frame(7, 2, np.ones((2, WIDTH), F)), "bad_frame"),
    "rows of another type": (frame("rows", "2", np.ones((2, WIDTH), F)), "bad_frame"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
async def test_tensors_that_no_pass_takes_are_refused(attacker: Attacker, middle: Target, case: str) -> None:
    sent, code = BAD_TENSORS[case]
    async with opened(attacker, middle) as session:
        await session.send(sent)
        assert (await session.error())["code"] == code


REQUESTS: dict[str, tuple[Kind, dict[str, Any], dict[str, np.ndarray], str]] = {
    "no rows": (Kind.FORWARD, {}, {}, "bad_tensor"),
    "another request's rows": (Kind.FORWARD, {"request": 2}, {"rows": ROWS}, "bad_tensor"),
    "no request": (Kind.FORWARD, {"request": "1"}, {"rows": ROWS}, "bad_frame"),
    "hidden states of a new kind": (Kind.FORWARD, {"hidden": "some"}, {"rows": ROWS}, "bad_frame"),
    "more logits than rows": (Kind.FORWARD, {"keep": 6}, {"rows": ROWS}, "bad_tensor"),
    "fewer than none": (Kind.FORWARD, {"keep": -1}, {"rows": ROWS}, "bad_tensor"),
    "half an adapter": (
        Kind.FORWARD, {}, {"rows": ROWS, LINEAR + ".lora_A": np.ones((2, WIDTH), F)}, "bad_tensor"
    ),
    "halves of two ranks": (
        Kind.FORWARD, {}, {"rows": ROWS, LINEAR + ".lora_A": np.ones((2, WIDTH), F),
                           LINEAR + ".lora_B": np.ones((WIDTH, 3), F)}, "bad_tensor",
    ),
    "no gradient": (Kind.BACKWARD, {}, {"rows": ROWS}, "bad_tensor"),
    "a gradient of other rows": (Kind.BACKWARD, {}, {"rows": ROWS, "grad": ROWS[:3]}, "bad_tensor"),
    "values that overflow": (
        Kind.FORWARD, {}, {"rows": ROWS, DOWN + ".lora_A": np.full((2, 512), 1e38, F),
                           DOWN + ".lora_B": np.full((WIDTH, 2), 1e38, F)}, "bad_tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REQUESTS)
async def test_requests_that_make_no_sense_are_refused(attacker: Attacker, middle: Target, case: str) -> None:
    kind, body, tensors, code = REQUESTS[case]
    async with opened(attacker, middle) as session:
        await put(session, 1, **tensors)
        error = await session.command(kind, {"request": 1, **body})
        assert error is not None and error["code"] == code


async def test_passes_are_refused_without_the_money_for_them(attacker: Attacker, middle: Target) -> None:
    poor = Key(secrets.token_bytes(32))
    fund(attacker, middle, poor, middle.cost(WINDOW))
    async with attacker.open(middle, poor) as session:
        rows = np.ones((2 * WINDOW, WIDTH), F)
        await put(session, 1, rows=rows)
        error = await session.command(Kind.FORWARD, {"request": 1})
        assert error is not None and error["code"] == "insufficient_funds"
        await put(session, 2, rows=rows[:WINDOW], grad=rows[:WINDOW])
        error = await session.command(Kind.BACKWARD, {"request": 2})
        assert error is not None and error["code"] == "insufficient_funds", "backward costs three times the rows"
        await put(session, 3, rows=rows[:WINDOW])
        assert await session.command(Kind.FORWARD, {"request": 3}) is None
    fund(attacker, middle, poor, middle.cost(WINDOW))
    assert (await attacker.owed(middle, poor))[0] == middle.cost(WINDOW)
