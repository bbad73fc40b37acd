"""The till: vouchers that the contract would pay, credit, funds, and what survives a restart."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness import samples
from tallystick_node.till import Funds, Till
from tallystick_protocol.errors import BadMessage, BadSignature, BadVoucher, InsufficientFunds
from tallystick_protocol.signing import Key, seal
from tallystick_protocol.types import Address, Wei
from tallystick_protocol.vouchers import Voucher

NODE = samples.address("node")
CLIENT, DELEGATE, STRANGER = samples.key("client"), samples.key("delegate"), samples.key("stranger")
ENOUGH = Funds(Wei(10**9), Wei(10**9), Wei(0))
CREDIT, POOL = Wei(100), Wei(50)
SIGNATURES = json.loads((Path(__file__).parents[1] / "vectors" / "eip712.json").read_text())["signatures"]


def may_sign(client: Address, signer: Address) -> bool:
    return signer == client or (client, signer) == (CLIENT.address, DELEGATE.address)


def open_till(folder: Path) -> Till:
    return Till(folder / "till.db", NODE, samples.ESCROW, CREDIT, POOL, may_sign)


@pytest.fixture
def till(tmp_path: Path) -> Iterator[Till]:
    opened = open_till(tmp_path)
    yield opened
    opened.close()


def voucher(total: int, key: Key = CLIENT, client: Address = CLIENT.address, node: Address = NODE) -> bytes:
    return seal(samples.ESCROW, Voucher(client, node, total), key)


def accept(till: Till, total: int, funds: Funds = ENOUGH) -> None:
    till.accept(voucher(total), CLIENT.address, funds, 0)


def funded(confirmed: int, latest: int | None = None) -> Funds:
    return Funds(Wei(confirmed), Wei(confirmed if latest is None else latest), Wei(0))


def test_vouchers_are_cumulative_and_the_newest_is_kept(till: Till) -> None:
    accept(till, 10)
    accept(till, 25)
    account = till.account(CLIENT.address)
    assert (account.signed, account.sealed) == (25, voucher(25))
    assert till.redeemable() == [(CLIENT.address, 25, voucher(25))]


def test_a_replayed_voucher_changes_nothing(till: Till) -> None:
    accept(till, 10)
    before = till.account(CLIENT.address)
    accept(till, 10)
    assert till.account(CLIENT.address) == before


def test_a_lower_voucher_is_refused_and_says_what_was_signed(till: Till) -> None:
    accept(till, 10)
    with pytest.raises(BadVoucher) as raised:
        accept(till, 9)
    assert raised.value.fields == {"signed": "10"}
    assert till.account(CLIENT.address).signed == 10


def test_a_voucher_for_another_node_or_of_another_client_is_refused(till: Till) -> None:
    with pytest.raises(BadVoucher, match="another node"):
        till.accept(voucher(10, node=samples.address("other")), CLIENT.address, ENOUGH, 0)
    theirs = voucher(10, key=STRANGER, client=STRANGER.address)
    with pytest.raises(BadVoucher, match="another client"):
        till.accept(theirs, CLIENT.address, ENOUGH, 0)
    assert till.redeemable() == []


def test_a_voucher_that_a_stranger_signed_is_refused_and_a_delegate_s_is_taken(till: Till) -> None:
    with pytest.raises(BadVoucher, match=r"may not sign .* has set with Escrow\.setSigner \(a contract wallet"):
        till.accept(voucher(10, key=STRANGER), CLIENT.address, ENOUGH, 0)
    till.accept(voucher(10, key=DELEGATE), CLIENT.address, ENOUGH, 0)
    assert till.account(CLIENT.address).signed == 10


@pytest.mark.parametrize("total", [10, 5, 0])
def test_a_low_total_does_not_excuse_a_bad_signature(till: Till, total: int) -> None:
    accept(till, 10)
    sealed = voucher(total)
    with pytest.raises(BadSignature):
        till.accept(sealed[:-1] + b"\0", CLIENT.address, ENOUGH, 0)
    with pytest.raises(BadVoucher, match="may not sign"):
        till.accept(voucher(total, key=STRANGER), CLIENT.address, ENOUGH, 0)
    with pytest.raises(BadMessage):
        till.accept(sealed[:-65], CLIENT.address, ENOUGH, 0)


def test_every_other_form_of_a_signature_is_refused_by_a_code_of_the_protocol(till: Till) -> None:
    words = voucher(10)[:-65]
    for case in SIGNATURES:
        if case["malformed"]:
            with pytest.raises((BadSignature, BadMessage, BadVoucher)):
                till.accept(words + bytes.fromhex(case["signature"][2:]), CLIENT.address, ENOUGH, 0)
    assert till.redeemable() == []


def test_a_voucher_of_another_domain_is_refused(till: Till) -> None:
    forged = seal(samples.STAKING, Voucher(CLIENT.address, NODE, 10), CLIENT)
    with pytest.raises(BadVoucher):
        till.accept(forged, CLIENT.address, ENOUGH, 0)


def test_a_voucher_beyond_what_the_channel_holds_is_refused(till: Till) -> None:
    accept(till, 100, funded(50, 100))
    with pytest.raises(InsufficientFunds) as raised:
        accept(till, 101, funded(50, 100))
    assert raised.value.fields == {"funded": "100", "needed": "101", "node": NODE}


def test_totals_beyond_64_bits_are_kept_exactly(tmp_path: Path) -> None:
    till, total = open_till(tmp_path), (1 << 256) - 1
    accept(till, total, funded(total))
    till.close()
    again = open_till(tmp_path)
    assert again.account(CLIENT.address).signed == total
    assert again.redeemable() == [(CLIENT.address, total, voucher(total))]
    again.close()


def test_rows_are_computed_up_to_the_credit_and_not_beyond(till: Till) -> None:
    till.charge(CLIENT.address, Wei(60))
    assert till.has_credit(CLIENT.address, Wei(40))
    assert not till.has_credit(CLIENT.address, Wei(41))
    accept(till, 1)
    assert till.has_credit(CLIENT.address, Wei(41))


def test_a_step_larger_than_the_credit_needs_an_empty_slate(till: Till) -> None:
    assert till.has_credit(CLIENT.address, Wei(1000))
    till.charge(CLIENT.address, Wei(1000))
    assert not till.has_credit(CLIENT.address, Wei(1))
    accept(till, 999)
    assert till.has_credit(CLIENT.address, Wei(99))
    assert not till.has_credit(CLIENT.address, Wei(1000))
    accept(till, 1000)
    assert till.has_credit(CLIENT.address, Wei(1000))


def test_what_is_paid_ahead_is_credit(till: Till) -> None:
    accept(till, 500)
    assert till.account(CLIENT.address).unsigned == -500
    assert till.has_credit(CLIENT.address, Wei(600))


def test_rows_are_computed_against_confirmed_money(till: Till) -> None:
    till.charge(CLIENT.address, Wei(60))
    till.check_funds(CLIENT.address, Wei(40), funded(100))
    with pytest.raises(InsufficientFunds, match="tallystick fund") as raised:
        till.check_funds(CLIENT.address, Wei(41), funded(100))
    assert raised.value.fields == {"funded": "100", "needed": "101", "node": NODE}


def test_unconfirmed_money_counts_up_to_one_pool_for_everybody(till: Till) -> None:
    a, b = samples.address("a"), samples.address("b")
    till.check_funds(a, Wei(30), funded(0, 1000))
    till.check_funds(b, Wei(20), funded(0, 1000))
    for client in (a, b):
        with pytest.raises(InsufficientFunds):
            till.check_funds(client, Wei(31), funded(0, 1000))
    till.check_funds(a, Wei(30), funded(1000))  # confirmed: the pool is free again
    till.check_funds(b, Wei(50), funded(0, 1000))


def test_only_what_exceeds_the_confirmed_money_draws_on_the_pool(till: Till) -> None:
    till.check_funds(CLIENT.address, Wei(150), funded(100, 1000))
    with pytest.raises(InsufficientFunds):
        till.check_funds(CLIENT.address, Wei(151), funded(100, 1000))


def test_the_pool_never_goes_beyond_what_is_there(till: Till) -> None:
    with pytest.raises(InsufficientFunds):
        till.check_funds(CLIENT.address, Wei(20), funded(0, 19))


def test_a_refused_check_draws_nothing_from_the_pool(till: Till) -> None:
    for _ in range(3):
        with pytest.raises(InsufficientFunds):
            till.check_funds(CLIENT.address, Wei(51), funded(0, 1000))
    till.check_funds(samples.address("other"), Wei(50), funded(0, 1000))


def test_what_is_settled_and_what_is_signed_survives_a_restart(tmp_path: Path) -> None:
    till = open_till(tmp_path)
    till.charge(CLIENT.address, Wei(7))
    till.settle(CLIENT.address, 5)
    accept(till, 3)
    till.charge(CLIENT.address, Wei(100))  # not settled: a crash loses it
    again = open_till(tmp_path)
    account = again.account(CLIENT.address)
    assert (account.owed, account.signed, account.sealed) == (7, 3, voucher(3))
    again.close()
    till.close()


def test_closing_writes_what_is_owed(tmp_path: Path) -> None:
    till = open_till(tmp_path)
    till.charge(CLIENT.address, Wei(7))
    till.charge(samples.address("other"), Wei(8))
    till.close()
    again = open_till(tmp_path)
    assert [again.account(client).owed for client in (CLIENT.address, samples.address("other"))] == [7, 8]
    again.close()


def test_an_accepted_voucher_is_durable_before_it_gives_credit(till: Till, tmp_path: Path) -> None:
    till.charge(CLIENT.address, Wei(100))
    accept(till, 100)
    other = open_till(tmp_path)
    assert other.account(CLIENT.address).signed == 100


def test_settling_never_takes_a_voucher_back(tmp_path: Path) -> None:
    till, stale = open_till(tmp_path), open_till(tmp_path)
    assert stale.account(CLIENT.address).signed == 0
    stale.charge(CLIENT.address, Wei(5))
    accept(till, 10)
    stale.settle(CLIENT.address, 0)
    stale.close()
    assert till.redeemable() == [(CLIENT.address, 10, voucher(10))]
    till.close()


def test_rows_charged_while_a_voucher_is_written_are_kept(till: Till, monkeypatch: pytest.MonkeyPatch) -> None:
    write = till._db.transaction

    @contextmanager
    def slow() -> Iterator[sqlite3.Connection]:
        with write() as db:
            yield db
            till.charge(CLIENT.address, Wei(5))  # the event loop goes on while a thread waits for the disk

    monkeypatch.setattr(till._db, "transaction", slow)
    accept(till, 10)
    assert (till.account(CLIENT.address).owed, till.account(CLIENT.address).signed) == (5, 10)
    till.settle(CLIENT.address, 0)
    assert (till.account(CLIENT.address).owed, till.account(CLIENT.address).signed) == (10, 10)


def test_charges_settlements_and_vouchers_from_many_threads_lose_nothing(tmp_path: Path) -> None:
    till = open_till(tmp_path)
    start = threading.Barrier(4)
    vouchers = [voucher(total) for total in range(1, 41)]

    def pay(mine: list[bytes]) -> None:
        start.wait(timeout=10)
        for sealed in mine:
            try:
                till.accept(sealed, CLIENT.address, ENOUGH, 0)
            except BadVoucher:
                continue  # the other payer was ahead

    def charge() -> None:
        start.wait(timeout=10)
        for _ in range(500):
            till.charge(CLIENT.address, Wei(1))

    def settle() -> None:
        start.wait(timeout=10)
        for _ in range(30):
            till.settle(CLIENT.address, 0)

    threads = [
        threading.Thread(target=pay, args=(vouchers[::2],)),
        threading.Thread(target=pay, args=(vouchers[1::2],)),
        threading.Thread(target=charge),
        threading.Thread(target=settle),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert (till.account(CLIENT.address).owed, till.account(CLIENT.address).signed) == (500, 40)
    till.close()
    again = open_till(tmp_path)
    assert (again.account(CLIENT.address).owed, again.account(CLIENT.address).signed) == (500, 40)
    again.close()


def test_asking_for_the_account_of_a_stranger_leaves_nothing_behind(tmp_path: Path) -> None:
    till = open_till(tmp_path)
    for number in range(200):
        assert till.account(samples.address(f"stranger {number}")).owed == 0
    till.close()
    again = open_till(tmp_path)
    assert again._db.read("SELECT count(*) FROM ledger") == [(0,)]
    again.close()
