"""The till against a plain model: no history of steps and vouchers lets a client have more than it may."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from harness import samples
from tallystick_node.till import Funds, Till
from tallystick_protocol.errors import BadVoucher, InsufficientFunds
from tallystick_protocol.signing import seal
from tallystick_protocol.types import Wei
from tallystick_protocol.vouchers import Voucher

NODE = samples.address("node")
CLIENTS = [samples.key("client a"), samples.key("client b")]
CREDIT, POOL = 100, 40
WHICH = st.integers(0, 1)
AMOUNT = st.one_of(st.integers(0, 10), st.integers(20, 60), st.integers(0, 150))


class Machine(RuleBasedStateMachine):
    """Two clients; confirmed and unconfirmed money comes, rows are asked for, vouchers are sent, the node restarts."""

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.owed, self.signed = [0, 0], [0, 0]
        self.confirmed, self.latest, self.exposed = [20, 0], [300, 500], [0, 0]
        self.open()

    def open(self) -> None:
        path = Path(self.folder.name) / "till.db"
        self.till = Till(path, NODE, samples.ESCROW, Wei(CREDIT), Wei(POOL), lambda client, signer: client == signer)

    def funds(self, who: int) -> Funds:
        return Funds(Wei(self.confirmed[who]), Wei(self.latest[who]), Wei(0))

    @rule(who=WHICH, amount=AMOUNT)
    def fund(self, who: int, amount: int) -> None:
        self.latest[who] += amount

    @rule(who=WHICH)
    def confirm(self, who: int) -> None:
        self.confirmed[who] += (self.latest[who] - self.confirmed[who]) // 4

    @rule(who=WHICH, cost=AMOUNT)
    def step(self, who: int, cost: int) -> None:
        client, unsigned = CLIENTS[who].address, self.owed[who] - self.signed[who]
        may = unsigned + cost <= CREDIT or unsigned <= 0
        assert self.till.has_credit(client, Wei(cost)) == may
        if not may:
            return
        needed = self.owed[who] + cost
        exposed = max(needed - self.confirmed[who], 0)
        if exposed and (needed > self.latest[who] or exposed + self.exposed[1 - who] > POOL):
            with pytest.raises(InsufficientFunds):
                self.till.check_funds(client, Wei(cost), self.funds(who))
            return
        self.till.check_funds(client, Wei(cost), self.funds(who))
        self.till.charge(client, Wei(cost))
        self.exposed[who] = exposed
        self.owed[who] = needed

    @rule(who=WHICH, total=st.one_of(st.integers(-3, 3), st.integers(1, 60), st.integers(-400, 400)))
    def pay(self, who: int, total: int) -> None:
        """total: relative to what was signed before."""
        total = max(self.signed[who] + total, 0)
        sealed = seal(samples.ESCROW, Voucher(CLIENTS[who].address, NODE, total), CLIENTS[who])
        client = CLIENTS[who].address
        if total > self.latest[who]:
            with pytest.raises(InsufficientFunds):
                self.till.accept(sealed, client, self.funds(who), 0)
        elif total < self.signed[who]:
            with pytest.raises(BadVoucher):
                self.till.accept(sealed, client, self.funds(who), 0)
        else:
            self.till.accept(sealed, client, self.funds(who), 0)
            self.signed[who] = total

    @rule(who=WHICH)
    def settle(self, who: int) -> None:
        self.till.settle(CLIENTS[who].address, 0)

    @rule()
    def restart(self) -> None:
        self.till.close()
        self.open()
        self.exposed = [0, 0]

    @invariant()
    def ledgers_agree(self) -> None:
        if not hasattr(self, "till"):
            return
        for who, key in enumerate(CLIENTS):
            account = self.till.account(key.address)
            assert (account.owed, account.signed) == (self.owed[who], self.signed[who])
        found = {client: total for client, total, _ in self.till.redeemable()}
        assert found == {k.address: s for k, s in zip(CLIENTS, self.signed, strict=True) if s}
        assert sum(self.exposed) <= POOL

    def teardown(self) -> None:
        if hasattr(self, "till"):
            self.till.close()
            self.folder.cleanup()


TestTill = Machine.TestCase
TestTill.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
