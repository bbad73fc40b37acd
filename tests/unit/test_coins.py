"""What falls to be audited under `audit`: by secret coins, as many as a session is long."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from harness import samples
from tallystick import AsyncClient
from tallystick.routing.proven import Proven
from tallystick.session.coins import AUDIT_EVERY, to_audit
from tallystick.session.repair import RolledBack
from tallystick.verdict import Verdict

ROUTE = [samples.candidate(str(start), start, start + 1) for start in range(4)]
DRAWS = 1500


def session(length: int, suspects: int = 0, sketches: bool = False) -> Any:
    known = {hop.node for hop in ROUTE[:suspects]}
    setting = SimpleNamespace(
        manifest=SimpleNamespace(model_id=samples.MODEL),
        suspicions=SimpleNamespace(is_suspect=lambda model, node, span: node in known),
        proven=Proven(),
    )
    return SimpleNamespace(
        setting=setting,
        route=ROUTE,
        ids=[0] * length,
        sketching=SimpleNamespace(is_on=sketches),
        openings=SimpleNamespace(peers=lambda index: []),
    )


@pytest.mark.parametrize(
    ("length", "coins"),
    [(1, 1), (AUDIT_EVERY, 1), (AUDIT_EVERY + 1, 2), (3 * AUDIT_EVERY, 3), (8 * AUDIT_EVERY, 8)],
)
def test_there_is_a_coin_for_every_512_positions_that_were_begun(length: int, coins: int) -> None:
    one = session(length)
    share = sum(bool(to_audit(one, 0.2)) for _ in range(DRAWS)) / DRAWS
    assert share == pytest.approx(1 - 0.8**coins, abs=0.06)
    each = [to_audit(one, 1.0) for _ in range(DRAWS)]
    assert all(len(set(drawn)) == len(drawn) <= min(coins, len(ROUTE)) and drawn for drawn in each)
    assert sum(map(len, each)) / DRAWS == pytest.approx(4 * (1 - 0.75**coins), abs=0.15)
    assert to_audit(one, 0.0) == []


def test_whom_much_speaks_against_is_always_audited() -> None:
    assert {tuple(to_audit(session(9, 1, True), 0.0)) for _ in range(20)} == {(0,)}
    assert to_audit(session(9, 1, False), 0.0) == []


@pytest.mark.parametrize(("policy", "audited"), [("audit", [3, 2, 1, 0]), ("off", [])])
async def test_an_audit_that_takes_everybody_back_leaves_the_others_to_be_done(policy: Any, audited: list[int]) -> None:
    one, done = session(64 * AUDIT_EVERY), []

    async def nothing() -> None: ...

    async def audit_at_end(index: int) -> None:
        done.append(index)
        one.has_audits = True
        if len(done) == 2:
            raise RolledBack(32)

    one.verdict, one.to_audit, one.has_audits, one.one_shot, one.setting.top_k = Verdict(policy), None, False, True, 0
    one.finish, one.take_leave, one.audit_at_end = nothing, nothing, audit_at_end
    one.setting.sides = SimpleNamespace(memory=None)
    client: Any = SimpleNamespace(
        settings=SimpleNamespace(audit_probability=1.0), planning=SimpleNamespace(proven=Proven())
    )
    if audited:
        with pytest.raises(RolledBack):
            await AsyncClient.finish(client, one, policy)
    await AsyncClient.finish(client, one, policy)
    assert done == audited
