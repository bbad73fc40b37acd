"""Papers as they travel: read back as written, and nothing else is read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from harness import samples
from tallystick_protocol.chain.book import AddressBook, Deployment
from tallystick_protocol.chain.papers import Paper, authorize, from_json, order_exit, order_signer, to_json
from tallystick_protocol.errors import BadMessage
from tallystick_protocol.signing import digest, recover
from tallystick_protocol.types import Wei
from tallystick_protocol.vouchers import Exit

KEY = samples.key("client")
NODE = samples.address("node")
BOOK = AddressBook(
    31337, "0x" + "00" * 32, "latest", {n: Deployment(samples.address(n), 1, "") for n in ("Token", "Escrow")}
)
PAPERS: list[Paper] = [
    authorize(BOOK, KEY, KEY.address, [(NODE, Wei(5)), (samples.address("other"), Wei(2**127))], 1_900_000_000),
    order_exit(BOOK, KEY, NODE, Wei(0), 3, 1_900_000_000),
    order_signer(BOOK, KEY, samples.address("signer"), False, 2**200, 1_900_000_000),
]


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.kind)
def test_a_paper_is_read_as_it_was_written(paper: Paper) -> None:
    assert from_json(json.loads(json.dumps(to_json(paper)))) == paper


def test_an_order_is_signed_by_the_client_in_the_escrows_domain() -> None:
    order = Exit(KEY.address, NODE, 0, 3, 1_900_000_000)
    assert recover(digest(BOOK.escrow_domain, order), PAPERS[1].signature) == KEY.address


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "burn"}, {"kind": ["exit"]}, {"amount": 5}, {"amount": "-5"}, {"amount": str(2**128)}, {"amount": "٣"},
        {"amount": "9" * 100}, {"node": "0x12"}, {"node": 7}, {"signature": "0x12"}, {"signature": None},
        {"more": 1}, {"nonce": "1e3"}, {"deadline": "1_0"},
    ],
    ids=str,
)  # fmt: skip
def test_nothing_else_is_a_paper(changes: dict[str, Any]) -> None:
    with pytest.raises(BadMessage):
        from_json({**to_json(PAPERS[1]), **changes})


@pytest.mark.parametrize("value", [None, [], "paper", {}, {"kind": "exit"}])
def test_what_is_no_object_or_lacks_fields_is_no_paper(value: Any) -> None:
    with pytest.raises(BadMessage):
        from_json(value)


@pytest.mark.parametrize("deposits", [[], [["0x12", "5"]], [[NODE]], [[NODE, "5"]] * 65, "all", [NODE, "5"]])
def test_deposits_are_few_and_whole(deposits: Any) -> None:
    with pytest.raises(BadMessage):
        from_json({**to_json(PAPERS[0]), "deposits": deposits})
