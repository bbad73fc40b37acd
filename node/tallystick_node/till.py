"""The till: what each client owes, what it has signed, and whether the next rows may be computed.

Vouchers are postpaid, one ledger per client over all sessions. Rows are computed while what is owed and not yet signed
for stays within the offer's credit, and only against money that the channel holds at the configured block tag, or,
within a small separate pool, at the latest block. A voucher is stored durably before any output that it allows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tallystick_node.database import Database
from tallystick_protocol.errors import BadVoucher, InsufficientFunds
from tallystick_protocol.signing import Domain, unseal
from tallystick_protocol.types import Address, Wei
from tallystick_protocol.vouchers import Voucher

NOTHING = Wei(0)

EXPOSED_FOR_S = 120.0
"""After this a funding transaction is confirmed or gone; what is owed by then is bounded by credit alone."""

_SETTLE = """
INSERT INTO ledger(client, owed, signed, sealed, updated) VALUES(?1, ?2, '0', x'', ?3)
  ON CONFLICT(client) DO UPDATE SET owed=?2, updated=?3
"""
_SIGN = """
INSERT INTO ledger(client, owed, signed, sealed, updated) VALUES(?1, ?2, ?3, ?4, ?5)
  ON CONFLICT(client) DO UPDATE SET signed=?3, sealed=?4, updated=?5
"""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS ledger(
  client TEXT PRIMARY KEY, owed TEXT NOT NULL, signed TEXT NOT NULL, sealed BLOB NOT NULL, updated INTEGER NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Funds:
    """What a channel holds, in token base units since the beginning of time: `funded` less what is exiting.

    confirmed: at the configured block tag (`safe`); latest: at the newest block, which a reorganisation may take back.
    """

    confirmed: Wei
    latest: Wei
    paid: Wei


@dataclass(frozen=True, slots=True)
class Account:
    """One client's ledger: owed and signed since the beginning of time, and the voucher that says so."""

    owed: Wei
    signed: Wei
    sealed: bytes

    @property
    def unsigned(self) -> Wei:
        return Wei(self.owed - self.signed)


class Till:
    """The node's money. Signatures are checked here, strictly, by the form that the contract accepts."""

    def __init__(
        self,
        path: Path,
        node: Address,
        domain: Domain,
        credit: Wei,
        unconfirmed_pool: Wei,
        is_signer: Callable[[Address, Address], bool],
    ) -> None:
        """is_signer(client, signer): may this key sign for the client (the client itself, or a signer it has set)?"""
        self._db = Database(path, _SCHEMA, version=1)
        self._node = node
        self._domain = domain
        self._credit = credit
        self._pool = unconfirmed_pool
        self._is_signer = is_signer
        self._accounts: dict[Address, Account] = {}
        self._lock = threading.RLock()  # an account in memory; never held while the disk is written
        self._accepting = threading.Lock()  # one voucher at a time, until it is durable
        self._exposed: dict[Address, tuple[Wei, float]] = {}  # owed against money not confirmed yet, and since when

    def account(self, client: Address) -> Account:
        known = self._accounts.get(client)
        if known is not None:
            return known
        rows = self._db.read("SELECT owed, signed, sealed FROM ledger WHERE client=?", client)
        if not rows:
            return Account(Wei(0), Wei(0), b"")  # not remembered: anybody may ask under ever new addresses
        owed, signed, sealed = rows[0]
        found = Account(Wei(int(str(owed))), Wei(int(str(signed))), bytes(sealed))  # type: ignore[call-overload]
        return self._accounts.setdefault(client, found)

    def has_credit(self, client: Address, cost: Wei, more: Wei = NOTHING) -> bool:
        """May rows of this cost be computed before the next voucher? One step beyond credit needs an empty slate.

        more: what goes on top of the credit.
        """
        unsigned = self.account(client).unsigned
        return unsigned + cost <= self._credit + more or unsigned <= 0

    def check_funds(self, client: Address, cost: Wei, funds: Funds) -> None:
        """Raises InsufficientFunds when the channel does not cover what would be owed."""
        needed = self.account(client).owed + cost
        if needed <= funds.confirmed:
            self._exposed.pop(client, None)
            return
        exposed = Wei(needed - funds.confirmed)
        now = time.monotonic()
        recent = {c: (wei, at) for c, (wei, at) in self._exposed.items() if now - at < EXPOSED_FOR_S}
        others = sum(wei for other, (wei, _) in recent.items() if other != client)
        if needed <= funds.latest and exposed + others <= self._pool:
            self._exposed = {**recent, client: (exposed, now)}
            return
        raise InsufficientFunds(
            f"the channel holds {funds.latest} and {needed} would be owed; fund it: tallystick fund --node"
            f" {self._node}",
            funded=str(funds.latest),
            needed=str(needed),
            node=self._node,
        )

    def charge(self, client: Address, cost: Wei) -> None:
        """Book computed rows; durable with the next `settle` or voucher."""
        with self._lock:
            account = self.account(client)
            self._accounts[client] = Account(Wei(account.owed + cost), account.signed, account.sealed)

    def settle(self, client: Address, now: int) -> None:
        """Write a client's ledger durably: once per window, so that a crash loses at most one."""
        with self._db.transaction() as db:
            db.execute(_SETTLE, (client, str(self.account(client).owed), now))

    def accept(self, sealed: bytes, client: Address, funds: Funds, now: int) -> Account:
        """Take a voucher of this client. Durable when this returns.

        Raises BadSignature, BadVoucher (another node's or client's, a lower total), InsufficientFunds (beyond what the
        channel holds: the contract would not pay it).
        """
        voucher, signer = unseal(self._domain, Voucher, sealed)
        if voucher.node != self._node:
            raise BadVoucher("the voucher is made out to another node", node=voucher.node)
        if voucher.client != client:
            raise BadVoucher("the voucher is another client's", client=voucher.client)
        if not self._is_signer(client, signer):
            raise BadVoucher(
                f"the voucher is signed by {signer}, who may not sign for {client}: only its own key may, and those"
                " that it has set with Escrow.setSigner (a contract wallet has no other)"
            )
        if voucher.total > funds.latest:
            raise InsufficientFunds(
                f"the voucher promises {voucher.total}, the channel holds {funds.latest}; fund it first",
                funded=str(funds.latest),
                needed=str(voucher.total),
                node=self._node,
            )
        with self._accepting:
            account = self.account(client)
            if voucher.total < account.signed:
                raise BadVoucher(
                    f"the voucher's total {voucher.total} is below {account.signed}, signed before",
                    signed=str(account.signed),
                )
            if voucher.total > account.signed:
                with self._db.transaction() as db:
                    db.execute(_SIGN, (client, str(account.owed), str(voucher.total), sealed, now))
                with self._lock:
                    owed = self.account(client).owed  # rows may have been charged meanwhile
                    self._accounts[client] = Account(owed, Wei(voucher.total), sealed)
        return self.account(client)

    def redeemable(self) -> list[tuple[Address, Wei, bytes]]:
        """(client, total, sealed voucher) for every client that has signed one."""
        rows = self._db.read("SELECT client, signed, sealed FROM ledger WHERE signed != '0'")
        return [(Address(str(client)), Wei(int(str(signed))), bytes(sealed)) for client, signed, sealed in rows]  # type: ignore[call-overload]

    def close(self) -> None:
        """Write what is owed durably, for all clients at once."""
        now = int(time.time())
        with self._db.transaction() as db:
            db.executemany(_SETTLE, [(client, str(account.owed), now) for client, account in self._accounts.items()])
        self._db.close()
