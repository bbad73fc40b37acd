"""What a client owes: receipts that stand, rows that are due, vouchers over several sessions at one node."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import Any

import pytest

from harness import samples
from tallystick.payments import Need, Purse
from tallystick.session.remote import Hearing, Opening, Remote, Standing
from tallystick_node.session.record import Record
from tallystick_node.session.windows import Terms as NodeTerms
from tallystick_node.session.windows import Windows
from tallystick_protocol.chain.reads import ChannelFunds
from tallystick_protocol.errors import BadSignature, ChainError, ConfigError, Rejected
from tallystick_protocol.frames import Frame, Kind
from tallystick_protocol.peer import error_frame
from tallystick_protocol.receipts import Receipt
from tallystick_protocol.signing import digest, seal, unseal
from tallystick_protocol.types import WINDOW, ZERO32, ZERO_ADDRESS, SessionId, Span, Wei
from tallystick_protocol.vouchers import Voucher, charge

CLIENT = samples.key("client")
CANDIDATE = samples.candidate("node", 0, 2)
NODE = CANDIDATE.node
UNIT = charge(Span(0, 2), 4, Wei(10), 1)


class Wire:
    """A channel that keeps what was sent."""

    peer = "node"

    def __init__(self) -> None:
        self.sent: list[Frame] = []

    async def send(self, frame: Frame) -> None:
        self.sent.append(frame)

    async def receive(self) -> Frame:
        raise AssertionError("nothing is read here")

    async def close(self) -> None: ...


def remote(wire: Wire | None = None) -> Remote:
    opening = Opening(samples.digest("nonce"), samples.MODEL, 4, 0, ZERO_ADDRESS, ZERO_ADDRESS, 4096, 8)
    channel: Any = wire or Wire()
    return Remote(CANDIDATE, opening, channel, samples.STAKING, CLIENT.address)


class Ledger:
    """The chain as far as a purse sees it."""

    def __init__(self, latest: int = 0, paid: int = 0) -> None:
        self.book = SimpleNamespace(escrow_domain=samples.ESCROW, chain_id=31337)
        self.latest, self.paid = latest, paid
        self.funded: list[Any] = []

    def funds(self, client: str, node: str) -> ChannelFunds:
        return ChannelFunds(Wei(self.latest), Wei(self.latest), Wei(self.paid))


def purse(ledger: Ledger | None = None, max_funding: int = 1000) -> Purse:
    chain: Any = ledger or Ledger()
    made = Purse(chain, CLIENT, Wei(max_funding))
    wallet: Any = SimpleNamespace(fund=lambda client, deposits: chain.funded.append((client, deposits)))
    made._wallet = wallet
    return made


def receipt(first: int, last: int, revision: int = 0) -> Receipt:
    return samples.receipt(first=first, last=last, revision=revision)


def total(sealed: bytes) -> int:
    voucher, signer = unseal(samples.ESCROW, Voucher, sealed)
    assert (signer, voucher.client, voucher.node) == (CLIENT.address, CLIENT.address, NODE)
    return voucher.total


def test_standing_receipts_chain_by_digest() -> None:
    standing = Standing()
    assert (standing.covered, standing.previous(0)) == (0, ZERO32)
    standing.put(0, receipt(0, 32), samples.digest("a"))
    standing.put(1, receipt(32, 40), samples.digest("b"))
    assert (standing.covered, standing.previous(1), standing.previous(2)) == (
        40,
        samples.digest("a"),
        samples.digest("b"),
    )
    standing.put(1, receipt(32, 64, revision=1), samples.digest("c"))
    assert (standing.covered, standing.previous(2), len(standing.receipts)) == (64, samples.digest("c"), 2)


@pytest.mark.parametrize(("length", "kept"), [(0, 0), (31, 0), (32, 1), (63, 1), (64, 2), (70, 2), (71, 2), (100, 2)])
def test_a_crop_keeps_the_complete_windows_before_it_only(length: int, kept: int) -> None:
    standing = Standing()
    for index, (first, last) in enumerate(((0, 32), (32, 64), (64, 70))):
        standing.put(index, receipt(first, last), samples.digest(str(index)))
    standing.crop(length)
    assert len(standing.receipts) == len(standing.digests) == kept


def test_rows_are_due_once_however_often_they_are_signed_for() -> None:
    hop = remote()
    hop.owe(receipt(0, 10), 0)
    hop.owe(receipt(0, 10, revision=1), 0)
    hop.owe(receipt(0, 32, revision=2), 0)
    hop.owe(receipt(32, 40, revision=2), 1)
    assert hop.rows_due == 40
    assert hop.due_after == {0: 32, 1: 40}


def test_rolling_back_lowers_nothing_and_rows_computed_anew_are_due_again() -> None:
    hop = remote()
    hop.owe(receipt(0, 32), 0)
    hop.crop(20, computed=40)  # 8 rows were computed and not signed for
    assert (hop.rows_due, hop.due_after) == (40, {})
    hop.owe(receipt(0, 32, revision=1), 0)
    assert hop.rows_due == 52  # 20 stood, 12 were computed again


def test_rows_taken_back_are_due_once_all_windows_have_passed_to_a_node_that_waits() -> None:
    hop = remote()
    hop.owe(receipt(0, 32), 0)
    hop.owe(receipt(32, 64), 1)
    hop.crop(32, computed=70)
    assert [hop.due_to(windows) for windows in (0, 1)] == [0, 32]
    remind(hop, owed=str(70 * UNIT), signed="0", at=32)
    assert [hop.due_to(windows) for windows in (0, 1)] == [0, 70], "nothing while a window may still fail"
    hop.owe(receipt(32, 64, revision=1), 1)
    assert [hop.due_to(windows) for windows in (0, 1, 2)] == [0, 32, 102]


@pytest.mark.parametrize("seed", range(30))
def test_what_is_due_is_what_a_node_computed_over_any_history(seed: int) -> None:
    coins = random.Random(seed)
    record, hop = Record(one_shot=False), remote()
    session = SessionId(samples.digest("session"))
    terms = NodeTerms(NODE, samples.MODEL, samples.digest("c"), session, 0, Span(0, 2), ZERO_ADDRESS, 8, "fp32", "f32")
    windows, computed = Windows(terms, record), 0

    def sign(most: int) -> None:
        for _ in range(most):
            claimed = windows.next_unsigned(0)
            if claimed is None:
                return
            index = claimed.first // WINDOW
            assert claimed.previous == hop.standing.previous(index)
            windows.signed(claimed, index, digest(samples.STAKING, claimed))
            hop.owe(claimed, index)

    for _ in range(coins.randrange(40)):
        what = coins.randrange(4)
        if what == 0:
            count = coins.choice((1, 3, 31, 32, 40))
            rows = [bytes([coins.randrange(256)]) for _ in range(count)]
            record.append(rows, rows, [True] * count)
            computed += count
        elif what == 1:
            windows.flush(len(record))
        elif what == 2:
            length = coins.randrange(len(record) + 1)
            hop.crop(length, computed=len(record))
            record.crop(length)
            windows.crop(length)
        else:
            sign(coins.choice((1, 2, 99)))
        assert hop.rows_due <= computed
    windows.flush(len(record))
    sign(999)
    assert hop.rows_due == computed
    assert hop.standing.covered == len(record)


def test_the_total_is_what_stood_before_and_the_price_of_the_rows() -> None:
    hop = remote()
    hop.base = Wei(1000)
    assert hop.total(0) == 1000
    assert hop.total(7) == 1000 + 7 * UNIT == 1000 + 7 * 3 * 10  # two layers and the embedding


async def test_vouchers_rise_and_nothing_is_sent_for_nothing() -> None:
    wire, money = Wire(), purse()
    hop = remote(wire)
    await hop.pay(0, money)
    await hop.pay(32, money)
    await hop.pay(32, money)
    await hop.pay(10, money)
    await hop.pay(40, money)
    assert [frame.kind for frame in wire.sent] == [Kind.VOUCHER] * 2
    assert [total(frame.body["voucher"]) for frame in wire.sent] == [32 * UNIT, 40 * UNIT]


async def test_two_sessions_at_one_node_both_pay_for_their_rows() -> None:
    money, wires = purse(), [Wire(), Wire()]
    hops = [remote(wire) for wire in wires]
    for hop in hops:
        hop.base = money.recall(NODE, Wei(0), b"", Wei(100))
    for rows in (10, 20, 30):
        await asyncio.gather(*(hop.pay(rows, money) for hop in hops))
    totals = sorted(total(frame.body["voucher"]) for wire in wires for frame in wire.sent)
    assert totals == [10 * UNIT * n for n in range(1, 7)]


def test_a_client_that_lost_its_state_recovers_it_from_its_own_voucher() -> None:
    sealed = seal(samples.ESCROW, Voucher(CLIENT.address, NODE, 500), CLIENT)
    money = purse()
    assert money.recall(NODE, Wei(500), sealed, Wei(0)) == 500
    assert total(money.promise(NODE, Wei(10))) == 510


def test_what_an_interrupted_session_left_unpaid_is_taken_over_up_to_a_bound() -> None:
    money = purse()
    with pytest.raises(Rejected, match="more than was ever at stake"):
        money.recall(NODE, Wei(101), b"", Wei(100))
    assert money.recall(NODE, Wei(100), b"", Wei(100)) == 100


def test_a_node_cannot_claim_debts_that_this_process_does_not_know_of() -> None:
    money = purse()
    money.recall(NODE, Wei(100), b"", Wei(100))
    money.leave(NODE)
    with pytest.raises(Rejected, match="more than was ever at stake"):
        money.recall(NODE, Wei(101), b"", Wei(100))
    money.expect(NODE, Wei(50))
    with pytest.raises(Rejected, match="more than was ever at stake"):
        money.recall(NODE, Wei(151), b"", Wei(100))
    assert money.recall(NODE, Wei(150), b"", Wei(100)) == 150


def test_rows_of_another_open_session_are_no_debt_of_this_one() -> None:
    money = purse()
    assert money.recall(NODE, Wei(0), b"", Wei(100)) == 0
    assert money.recall(NODE, Wei(90), b"", Wei(100)) == 0  # the first session's rows, which it pays for itself
    assert money.recall(NODE, Wei(9000), b"", Wei(100)) == 0
    assert total(money.promise(NODE, Wei(5))) == 5


def test_a_node_that_says_less_than_was_promised_lowers_nothing() -> None:
    money = purse()
    money.recall(NODE, Wei(50), b"", Wei(100))
    money.promise(NODE, Wei(10))
    money.leave(NODE)
    for owed in (0, -(10**9)):
        assert money.recall(NODE, Wei(owed), b"", Wei(100)) == 60
        money.leave(NODE)


def beside_an_interrupted_one(debt: int) -> Purse:
    """One session is open at the node; another one, opened beside it, has left a debt."""
    money = purse()
    for _ in range(2):
        money.recall(NODE, Wei(0), b"", Wei(100))
    money.expect(NODE, Wei(debt))
    money.leave(NODE)
    return money


def test_what_an_interrupted_session_left_is_taken_over_beside_an_open_one_and_once() -> None:
    money = beside_an_interrupted_one(50)
    assert money.settle(NODE, Wei(70), Wei(30), Wei(100), 10) == 40
    money.promise(NODE, Wei(40))
    assert money.settle(NODE, Wei(70), Wei(30), Wei(100), 10) == 0
    assert money.settle(NODE, Wei(999), Wei(30), Wei(100), 10) == 10
    money.promise(NODE, Wei(10))
    assert money.settle(NODE, Wei(999), Wei(30), Wei(100), 10) == 0
    money.leave(NODE)
    with pytest.raises(Rejected, match="more than was ever at stake"):
        money.recall(NODE, Wei(51), b"", Wei(100))


def test_no_more_is_taken_over_than_credit_and_a_window_for_each_interrupted_session() -> None:
    money = beside_an_interrupted_one(5000)
    for debt in (110, 0):
        assert money.settle(NODE, Wei(10**77), Wei(0), Wei(100), 10) == debt
        money.promise(NODE, Wei(debt))


def test_nothing_is_taken_over_while_more_sessions_are_open_or_where_none_was_interrupted() -> None:
    money = beside_an_interrupted_one(50)
    money.recall(NODE, Wei(50), b"", Wei(100))
    assert money.settle(NODE, Wei(50), Wei(0), Wei(100), 10) is None
    money.leave(NODE)
    assert money.settle(NODE, Wei(50), Wei(0), Wei(100), 10) == 50
    assert beside_an_interrupted_one(0).settle(NODE, Wei(50), Wei(0), Wei(100), 10) == 0


def remind(hop: Remote, **fields: Any) -> None:
    """The node says that it waits for a voucher."""
    hop._hearing = Hearing(lambda *_: None, lambda *_: None, lambda: None)
    hop._take(error_frame("payment_required", "send a voucher", fields))


async def test_a_node_that_waits_gets_what_interrupted_sessions_left_however_often_it_says_so() -> None:
    wire, money = Wire(), beside_an_interrupted_one(5 * UNIT)
    hop = remote(wire)
    await hop.pay(0, money)
    for _ in range(3):
        remind(hop, owed=str(12 * UNIT), signed="0", at=8)  # 8 rows of this session, 4 of the other one
        await hop.pay(0, money)
    hop.owe(receipt(0, 32), 0)
    for _ in range(3):
        await hop.pay(32, money)
    assert [total(frame.body["voucher"]) for frame in wire.sent] == [4 * UNIT, 36 * UNIT]


async def test_a_reminder_is_kept_until_other_sessions_have_left() -> None:
    wire, money = Wire(), beside_an_interrupted_one(5 * UNIT)
    money.recall(NODE, Wei(0), b"", Wei(100))
    hop = remote(wire)
    remind(hop, owed=str(5 * UNIT), signed="0", at=0)
    await hop.pay(0, money)
    assert not wire.sent
    money.leave(NODE)
    await hop.pay(0, money)
    assert [total(frame.body["voucher"]) for frame in wire.sent] == [5 * UNIT]


async def test_a_node_that_waits_gets_a_voucher_over_what_is_promised_already() -> None:
    wire, money = Wire(), purse()
    hop = remote(wire)
    hop.base = money.recall(NODE, Wei(100), b"", Wei(100))  # taken over at the opening, and no voucher over it
    money.recall(NODE, Wei(100), b"", Wei(100))
    for _ in range(3):
        remind(hop, owed="100", signed="0", at=0)
        await hop.pay(0, money)
    assert [total(frame.body["voucher"]) for frame in wire.sent] == [100]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"owed": "9" * 500, "at": 0},
        {"owed": 2**63, "at": -5},
        {"owed": "1e99", "at": 1.5},
        {"owed": "-7", "at": "x"},
        {"owed": None, "at": True},
        {"owed": str(10**77), "at": 2**63},
        {"owed": ["1"], "at": {}},
    ],
)
async def test_whatever_a_node_says_of_debts_it_gets_no_more_than_is_known(fields: dict[str, Any]) -> None:
    for debt in (0, 5 * UNIT):
        wire, money = Wire(), beside_an_interrupted_one(debt)
        hop = remote(wire)
        for _ in range(3):
            remind(hop, **fields)
            await hop.pay(0, money)
        assert money.promised(NODE) <= debt and len(wire.sent) <= 1


@pytest.mark.parametrize(
    "voucher",
    [
        seal(samples.ESCROW, Voucher(CLIENT.address, NODE, 500), samples.key("stranger")),
        seal(samples.ESCROW, Voucher(samples.address("x"), NODE, 500), CLIENT),
        seal(samples.ESCROW, Voucher(CLIENT.address, samples.address("x"), 500), CLIENT),
        seal(samples.STAKING, Voucher(CLIENT.address, NODE, 500), CLIENT),
    ],
    ids=["another signer", "another client", "another node", "another domain"],
)
def test_a_voucher_that_the_client_did_not_sign_for_this_node_is_refused(voucher: bytes) -> None:
    with pytest.raises(BadSignature, match="did not sign"):
        purse().recall(NODE, Wei(500), voucher, Wei(0))


def test_channels_are_filled_up_to_what_is_needed_beyond_what_was_spent_in_one_transaction() -> None:
    ledger = Ledger(latest=100, paid=30)
    money = purse(ledger)
    money.recall(NODE, Wei(40), b"", Wei(100))  # promised, not redeemed yet
    other = samples.address("other")
    assert money.reserve([Need(NODE, Wei(60)), Need(other, Wei(70))]) == 0
    assert money.reserve([Need(NODE, Wei(20)), Need(other, Wei(30))]) == 50
    assert [(client, sorted(deposits)) for client, deposits in ledger.funded] == [
        (CLIENT.address, sorted([(NODE, 20), (other, 30)]))
    ]


def test_what_one_session_has_set_aside_is_not_there_for_another_until_it_ends() -> None:
    ledger = Ledger(latest=100)
    money, need = purse(ledger), [Need(NODE, Wei(60))]
    assert money.reserve(need) == 0
    assert money.reserve(need) == 20
    ledger.latest += 20
    money.release(need)
    assert money.reserve(need) == 0


def test_what_earlier_sessions_came_to_is_topped_up_once_it_is_known() -> None:
    ledger = Ledger(latest=100)
    money = purse(ledger)
    assert not money.remembers(NODE)
    assert money.reserve([Need(NODE, Wei(60))]) == 0
    money.recall(NODE, Wei(70), b"", Wei(100))
    assert money.remembers(NODE)
    assert money.top_up(NODE) == 30


def test_no_more_is_put_into_channels_than_the_client_allows_and_a_refusal_sets_nothing_aside() -> None:
    ledger = Ledger()
    money = purse(ledger, max_funding=100)
    assert money.reserve([Need(NODE, Wei(60))]) == 60
    ledger.latest = 60
    for _ in range(3):
        with pytest.raises(ConfigError, match="may spend 40"):
            money.reserve([Need(NODE, Wei(41))])
    assert money.reserve([Need(NODE, Wei(40))]) == 40
    assert len(ledger.funded) == 2


def test_a_deposit_that_may_be_mined_yet_counts_and_one_that_was_refused_does_not() -> None:
    ledger = Ledger()
    money = purse(ledger, max_funding=100)
    failures = [ChainError("not mined in time", transaction="0x12"), ChainError("reverted")]

    def fund(client: str, deposits: Any) -> None:
        raise failures.pop()

    wallet: Any = SimpleNamespace(fund=fund)
    money._wallet = wallet
    for _ in range(2):
        with pytest.raises(ChainError):
            money.reserve([Need(NODE, Wei(60))])
    with pytest.raises(ConfigError, match="may spend 40"):
        money.reserve([Need(NODE, Wei(60))])
