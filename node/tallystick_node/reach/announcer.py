"""This node's own Reach: signed, tried by others, renewed; changed when an address or a key changes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence

from tallystick_node.reach.tls import TlsKeys
from tallystick_protocol import canonical_json
from tallystick_protocol.errors import ConfigError, TallystickError
from tallystick_protocol.peer import CONNECT_TIMEOUT_S, Peers
from tallystick_protocol.signing import Domain, Key
from tallystick_protocol.transport.contact import Addr, Contact
from tallystick_protocol.transport.reach import REACH_LIFETIME_S, Reach, seal_reach
from tallystick_protocol.types import Address

log = logging.getLogger(__name__)

ASKED = 5
"""Other nodes that are asked to dial."""

TRY_AGAIN_S = 120.0
"""Until somebody answers who could dial."""

ANSWER_BYTES = 1024
ANSWER_TIMEOUT_S = CONNECT_TIMEOUT_S + 3.0
Others = Callable[[], Awaitable[list[Contact]]]


class Announcer:
    """Signs where this node is. For one event loop."""

    def __init__(
        self,
        node: Address,
        key: Key,
        domain: Domain,
        keys: TlsKeys,
        direct: Sequence[Addr],
        peers: Peers,
        others: Others,
    ) -> None:
        """direct: addresses without a relay. others(): who may be asked to dial; raises TallystickErrors."""
        self._node = node
        self._key = key
        self._domain = domain
        self._keys = keys
        self._peers = peers
        self._others = others
        self._direct = tuple(direct)
        self._relayed: dict[Address, Addr] = {}
        self._seq = 0
        self._changed = asyncio.Event()
        self._tried = False
        self.sealed: bytes | None = None

    def relayed(self, relay: Address, addr: Addr | None) -> None:
        """A relay lets this node be reached at an address, or (None) does not any more."""
        before = self._relayed.pop(relay, None)
        if addr is not None:
            self._relayed[relay] = addr
        if addr != before:
            self._changed.set()

    async def wait_for_relays(self, count: int, timeout_s: float) -> None:
        """Until so many relays let this node be reached; no longer than `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while len(self._relayed) < count and (left := deadline - time.monotonic()) > 0:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._changed.wait()

    async def announce(self) -> Contact:
        """Have the addresses tried, sign a record of those that work, hand it on; returns what the record says.

        Where nobody else answers at all, none of them can be tried, and all are announced. Raises ConfigError when
        there is no address, or none that works.
        """
        self._changed.clear()
        addrs = (*self._direct, *self._relayed.values())
        if not addrs:
            raise ConfigError("no relay lets this node be reached, and it has no port: see host, announce and relays")
        reach, sealed = self._sign(addrs)
        others = await self._find_others()
        answers = [answer for answer in await asyncio.gather(*(self._ask(other, sealed) for other in others)) if answer]
        self._tried = bool(answers)
        if not answers:
            level = logging.WARNING if self.sealed is None else logging.DEBUG
            log.log(level, "nobody else answers, so nobody has tried this address: %s", reach.contact.url)
        else:
            tried = {at for answer in answers for at, works in enumerate(answer) if works is True}
            works = tuple(addr for at, addr in enumerate(addrs) if at in tried)
            for addr in addrs:
                if addr not in works:
                    log.warning("%s is not announced: no other node could dial it", addr.authority)
            if not works:
                raise ConfigError(
                    f"no other node could dial {', '.join(addr.authority for addr in addrs)}: open the port, set"
                    " announce to what others see, or serve through a relay (relays)"
                )
            if works != addrs:
                reach, sealed = self._sign(works)
        self.sealed = sealed
        return reach.contact

    async def keep(self, rotate_after_s: float) -> None:
        """Renew the record at a third of its life and when an address changes; rotate the key when it is old."""
        while True:
            renew_s = REACH_LIFETIME_S / 3 if self._tried else TRY_AGAIN_S
            wait_s = min(renew_s, max(1.0, rotate_after_s - self._keys.age_s))
            try:
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
            except TimeoutError:
                if self._keys.age_s >= rotate_after_s:
                    await asyncio.to_thread(self._keys.rotate)
            try:
                contact = await self.announce()
                if self._tried:
                    log.info("reachable at %s", ", ".join(addr.authority for addr in contact.addrs))
            except ConfigError as error:
                log.warning("%s", error)
                await asyncio.sleep(random.uniform(5.0, 15.0))
                self._changed.set()

    def _sign(self, addrs: tuple[Addr, ...]) -> tuple[Reach, bytes]:
        now = int(time.time())
        self._seq = max(now, self._seq + 1)
        reach = Reach(self._node, self._seq, now + REACH_LIFETIME_S, self._keys.pins, addrs)
        return reach, seal_reach(self._domain, reach, self._key)

    async def _find_others(self) -> list[Contact]:
        try:
            found = await self._others()
        except TallystickError as error:
            log.warning("who else serves is not known: %s", error)
            return []
        return random.sample(found, min(ASKED, len(found)))

    async def _ask(self, other: Contact, sealed: bytes) -> list[object]:
        """What another node says of each address; nothing if it does not answer."""
        try:
            data = await self._peers.ask(other, "/v1/reach", ANSWER_BYTES, ANSWER_TIMEOUT_S, body=sealed)
            dialled = canonical_json.parse(data)["dialled"]
        except (TallystickError, ValueError, KeyError, TypeError) as error:
            log.debug("%s dials nobody now (%s)", other.node, error)
            return []
        return dialled if isinstance(dialled, list) else []
