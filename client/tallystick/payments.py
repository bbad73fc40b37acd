"""The purse: channels that hold enough, and vouchers for work that checked out."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from dataclasses import dataclass

from tallystick_protocol.chain.reads import Chain
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.errors import BadSignature, ChainError, ConfigError, Rejected
from tallystick_protocol.signing import Key, seal, unseal
from tallystick_protocol.types import Address, Wei
from tallystick_protocol.vouchers import Voucher

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Need:
    """A channel to a node that should hold `amount` beyond what was spent already."""

    node: Address
    amount: Wei


@dataclass(slots=True, eq=False)
class _Request:
    """Needs of one session that waits for its channels. is_held: they have been set aside and funded."""

    needs: list[Need]
    is_held: bool = False


class Purse:
    """One client's money. Blocking where it touches the chain: call from a thread."""

    def __init__(self, chain: Chain, key: Key, max_funding: Wei) -> None:
        """max_funding: what this process may put into channels in all; funding beyond it is refused."""
        self._chain = chain
        self._key = key
        self._wallet = Wallet(chain, key)
        self._left = max_funding
        self._lock = threading.Lock()
        self._totals: dict[Address, Wei] = {}
        self._in_use: Counter[Address] = Counter()
        self._held: Counter[Address] = Counter()
        self._expected: dict[Address, Wei] = {}
        self._interrupted: Counter[Address] = Counter()
        self._requests: list[_Request] = []
        self._books = threading.Lock()  # for `_held` and `_requests`, which are changed on several threads

    @property
    def client(self) -> Address:
        return self._key.address

    def remembers(self, node: Address) -> bool:
        """Does this process know what it has promised the node so far?"""
        return node in self._totals

    def reserve(self, needs: list[Need]) -> Wei:
        """Set money aside for a session, and fund what the channels lack; returns what that put in.

        Sessions that ask while a transaction is under way share the next one. `release` gives the money back when the
        session ends. Raises ConfigError beyond max_funding, ChainError without tokens.
        """
        request = _Request(needs)
        with self._books:
            self._requests.append(request)
        try:
            with self._lock:
                if request.is_held:
                    return Wei(0)
                with self._books:
                    others = [one for one in self._requests if one is not request]
                if others:
                    try:
                        return self._hold_and_fund([request, *others])
                    except ConfigError:
                        log.debug("there is not enough for all sessions that ask")
                return self._hold_and_fund([request])
        finally:
            with self._books:
                self._requests.remove(request)

    def _hold_and_fund(self, requests: list[_Request]) -> Wei:
        needs = [need for request in requests for need in request.needs]
        self._hold(needs, 1)
        try:
            funded = self._fund({need.node for need in needs})
        except BaseException:
            self._hold(needs, -1)
            raise
        for request in requests:
            request.is_held = True
        return funded

    def release(self, needs: list[Need]) -> None:
        """Sessions that money was set aside for have ended."""
        self._hold(needs, -1)

    def top_up(self, node: Address) -> Wei:
        """Fund what a channel lacks, now that more is known of what was promised to its node."""
        with self._lock:
            return self._fund({node})

    def refill(self, node: Address) -> Wei:
        """Fund everything that is set aside for a node anew: what its channel holds is spoken for, as it says."""
        with self._lock:
            return self._deposit([(node, Wei(self._held[node]))])

    def cover(self, node: Address, needed: Wei) -> Wei:
        """As `refill`, for a node that waits until its channel holds so much; nothing if it does by now."""
        with self._lock:
            if self._chain.funds(self.client, node).latest >= needed:
                return Wei(0)
            return self._deposit([(node, Wei(self._held[node]))])

    def _hold(self, needs: list[Need], sign: int) -> None:
        with self._books:
            for need in needs:
                self._held[need.node] += sign * need.amount

    def _fund(self, nodes: set[Address]) -> Wei:
        deposits = []
        for node in sorted(nodes):
            funds = self._chain.funds(self.client, node)
            spent = max(funds.paid, self._totals.get(node, Wei(0)))
            if (missing := self._held[node] - (funds.latest - spent)) > 0:
                deposits.append((node, Wei(missing)))
        return self._deposit(deposits)

    def _deposit(self, deposits: list[tuple[Address, Wei]]) -> Wei:
        total = Wei(sum(amount for _, amount in deposits))
        if total > self._left:
            raise ConfigError(
                f"channels need {total} more token units, this client may spend {self._left}; raise max_cost"
            )
        if deposits:
            try:
                self._wallet.fund(self.client, deposits)
            except ChainError as error:
                if "transaction" in error.fields:  # it may be mined yet, and is spent then
                    self._left = Wei(self._left - total)
                raise
            self._left = Wei(self._left - total)
            log.info("funded %d channels with %d", len(deposits), total)
        return total

    def recall(self, node: Address, owed: Wei, sealed: bytes, max_debt: Wei, window: int = 0) -> Wei:
        """Start from what a node says at `opened`; returns the total that earlier sessions have come to.

        A client that lost its state recovers it from its own last voucher. Earlier rows without a voucher (an
        interrupted session) are accepted up to max_debt and a window for each session that this process knows to have
        been interrupted, and up to what it knows to be open; but not while
        another session is open at the node: what is owed for that one is promised there. Every recall is followed by
        one `leave`. Raises BadSignature, Rejected.
        """
        known = self._totals.get(node, Wei(0))
        if sealed:
            voucher, signer = unseal(self._chain.book.escrow_domain, Voucher, sealed)
            if signer != self.client or voucher.node != node or voucher.client != self.client:
                raise BadSignature(f"{node} shows a voucher that this client did not sign", hop=node)
            known = max(known, Wei(voucher.total))
        debt = Wei(owed - known)
        if not self._in_use[node]:
            if debt > self._at_stake(node, max_debt, window):
                raise Rejected(f"{node} claims {debt} for earlier sessions, more than was ever at stake", hop=node)
            known = max(known, owed)
            self._expected[node] = Wei(0)
            self._interrupted[node] = 0
        self._totals[node] = known
        self._in_use[node] += 1
        return known

    def expect(self, node: Address, debt: Wei) -> None:
        """A session ended with rows sent to the node and not paid: it may claim that much at the next opening."""
        self._expected[node] = Wei(self._expected.get(node, Wei(0)) + debt)
        self._interrupted[node] += debt > 0

    def settle(self, node: Address, owed: Wei, own: Wei, max_debt: Wei, window: int) -> Wei | None:
        """Take over what interrupted sessions left at a node, which says what is owed in all: it uses up the credit of
        the session that is open. Returns what is to be promised now; `recall` accepts that no more.

        own: what is owed for the open session. Whatever the node says, no more is taken over than `recall` would
        accept. None while several sessions are open: whose the rest is cannot be told.
        """
        if self._in_use[node] != 1:
            return None
        left = self._at_stake(node, max_debt, window)
        debt = Wei(max(min(owed - self.promised(node) - own, left), 0))
        self._expected[node] = Wei(left - debt)
        return debt

    def _at_stake(self, node: Address, max_debt: Wei, window: int) -> Wei:
        """What interrupted sessions can have left at most."""
        limit = Wei(max_debt + window * self._interrupted[node])
        return min(limit, self._expected.get(node, limit))

    def leave(self, node: Address) -> None:
        """A session at the node has ended."""
        self._in_use[node] -= 1

    def promised(self, node: Address) -> Wei:
        """The highest total that was signed for a node."""
        return self._totals.get(node, Wei(0))

    def promise(self, node: Address, more: Wei) -> bytes:
        """A sealed voucher for so much more than was promised before, in whichever session."""
        self._totals[node] = Wei(self._totals.get(node, Wei(0)) + more)
        return seal(self._chain.book.escrow_domain, Voucher(self.client, node, self._totals[node]), self._key)
