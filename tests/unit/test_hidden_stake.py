"""An RPC that leaves nodes out is noticed: what is found does not add up to what the contract counts."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness import samples
from tallystick.network import Network


def serving(*stakes: int) -> list[Any]:
    return [SimpleNamespace(record=SimpleNamespace(node=samples.address(f"n{i}"), active=stake))
            for i, stake in enumerate(stakes)]  # fmt: skip


@pytest.mark.parametrize(
    ("found", "weight", "complete"), [((5, 7), 12, True), ((5,), 12, False), ((), 12, False), ((), 0, True)]
)
def test_nodes_that_an_rpc_hides_are_missing_from_the_sum(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, found: tuple[int, ...], weight: int, complete: bool
) -> None:
    chain: Any = SimpleNamespace(
        book=SimpleNamespace(staking_domain=samples.STAKING), node_of=None, locate=None,
        serving=lambda model: serving(*found), weight=lambda model: weight,
    )  # fmt: skip
    nobody: Any = SimpleNamespace()
    network = Network(chain, nobody, tmp_path, [])
    record: Any = SimpleNamespace(id=samples.MODEL)
    with caplog.at_level(logging.WARNING):
        entries, adds_up = network._serving(record)
    assert (len(entries), adds_up) == (len(found), complete)
    assert ("this RPC hides some" in caplog.text) is not complete
