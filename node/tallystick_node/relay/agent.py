"""Being reached through relays: registered at each for as long as the node runs, dialling back when it is called."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import socket
import time
from collections.abc import Awaitable, Callable

from tallystick_node.relay.hello import dial_back_line
from tallystick_node.relay.splice import splice
from tallystick_node.relay.wallet import RelayBill, RelayPurse, Terms
from tallystick_protocol.errors import InsufficientFunds, TallystickError
from tallystick_protocol.frames import Frame, Kind, take
from tallystick_protocol.messages import RelayRegister
from tallystick_protocol.peer import Channel, Peers, expect
from tallystick_protocol.signing import Domain, Key, seal
from tallystick_protocol.transport.contact import Addr, Contact
from tallystick_protocol.transport.directory import Directory
from tallystick_protocol.transport.scopes import MayDial, resolve
from tallystick_protocol.types import Address, Wei

log = logging.getLogger(__name__)

REGISTER_TIMEOUT_S = 15.0
DIAL_TIMEOUT_S = 5.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 60.0
SOCKETS_AT_ONCE = 256
Serve = Callable[[socket.socket], Awaitable[None]]


class RelayAgent:
    """This node at one relay."""

    def __init__(
        self,
        relay: Contact,
        node: Address,
        key: Key,
        domain: Domain,
        peers: Peers,
        directory: Directory,
        purse: RelayPurse,
        max_price: Wei,
        may_dial: MayDial,
    ) -> None:
        """relay: as the settings name it. max_price: the most that a byte may cost."""
        self._relay = relay
        self._node = node
        self._key = key
        self._domain = domain
        self._peers = peers
        self._directory = directory
        self._purse = purse
        self._max_price = max_price
        self._may_dial = may_dial
        self._sockets: set[asyncio.Task[None]] = set()

    async def run(self, serve: Serve, reachable: Callable[[Address, Addr | None], None]) -> None:
        """Register, for ever; returns never. serve(socket): what a socket that was dialled back is handed to.

        Cancelled, it calls no more; connections that it has brought go on until the other side ends them.
        reachable(relay, address): called when callers find this node there, and with None when they do not any more.
        """
        pause_s, relay = FIRST_PAUSE_S, self._relay.node
        while True:
            try:
                await self._register_and_listen(serve, reachable)
                pause_s = FIRST_PAUSE_S
            except InsufficientFunds as error:
                if not await self._fund(error):
                    pause_s = LONGEST_PAUSE_S
            except TallystickError as error:
                log.warning("relay %s: %s", relay, error)
                self._directory.doubt(relay)
            finally:
                reachable(relay, None)
            await asyncio.sleep(random.uniform(0.5, 1.0) * pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _register_and_listen(self, serve: Serve, reachable: Callable[[Address, Addr | None], None]) -> None:
        """One control connection; returns when it has ended after it was of use. Raises TallystickErrors before."""
        contact = await self._directory.introduce(self._relay)
        channel = await self._peers.connect(contact, contact.node, "/v1/relay")
        bill: RelayBill | None = None
        try:
            claim = RelayRegister(contact.node, channel.spki, self._node, secrets.token_bytes(32), int(time.time()))
            await channel.send(Frame(Kind.REGISTER, {"register": seal(self._domain, claim, self._key)}))
            answer = await expect(channel, Kind.REGISTERED, REGISTER_TIMEOUT_S)
            terms = Terms.read(answer.body, self._max_price, contact.node)
            owed, shown = take(answer.body, "owed", str)[:78], take(answer.body, "voucher", bytes)
            claimed = Wei(int(owed) if owed.isascii() and owed.isdigit() else 0)
            base, signed = self._purse.recall(contact.node, claimed, shown, terms)
            bill = RelayBill(self._purse, contact.node, terms, base, signed, channel)
            place = contact.addrs[0]
            log.info("registered at relay %s, %s", contact.node, place.authority)
            reachable(contact.node, Addr("relay", place.host, place.port, via=contact.node))
            try:
                await self._listen(channel, contact, bill, serve)
            except TallystickError as error:
                log.warning("relay %s is lost: %s", contact.node, error)
        finally:
            if bill is not None:
                await bill.close()
            await channel.close()

    async def _listen(self, channel: Channel, relay: Contact, bill: RelayBill, serve: Serve) -> None:
        """Answer calls until the connection ends. Raises Unreachable, BadFrame."""
        while True:
            frame = await channel.receive()
            if frame.kind is Kind.CALL:
                token = take(frame.body, "token", bytes)
                if len(self._sockets) < SOCKETS_AT_ONCE:
                    task = asyncio.create_task(self._dial_back(relay, token, bill, serve))
                    self._sockets.add(task)
                    task.add_done_callback(self._sockets.discard)
            elif frame.kind is Kind.ERROR and not bill.pay_soon():
                return  # the two counts differ: they are settled by registering again

    async def _dial_back(self, relay: Contact, token: bytes, bill: RelayBill, serve: Serve) -> None:
        try:
            sock = await self._connect(relay)
        except OSError as error:
            log.warning("dialling back to relay %s failed (%s)", relay.node, error)
            return
        try:
            await asyncio.get_running_loop().sock_sendall(sock, dial_back_line(token))
            if bill.is_free:
                await serve(sock)
                return
            ours, counted = socket.socketpair()
            counted.setblocking(False)
            copying = asyncio.create_task(splice(sock, counted, bill))
            try:
                await serve(ours)
            except OSError:
                copying.cancel()
                raise
            await copying
        except OSError as error:
            log.debug("a caller through relay %s was not taken (%s)", relay.node, error)
            sock.close()

    async def _connect(self, relay: Contact) -> socket.socket:
        """A fresh TCP connection to the relay. Raises OSError."""
        loop = asyncio.get_running_loop()
        failure = OSError("no address of the relay may be dialled")
        for addr in relay.addrs:
            for ip in filter(self._may_dial, await resolve(addr.host, addr.port)):
                sock = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET)
                sock.setblocking(False)
                try:
                    async with asyncio.timeout(DIAL_TIMEOUT_S):
                        await loop.sock_connect(sock, (ip, addr.port))
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    return sock
                except BaseException as error:
                    sock.close()
                    if not isinstance(error, OSError):
                        raise
                    failure = error
        raise failure

    async def _fund(self, error: InsufficientFunds) -> bool:
        """Put money into the channel as the relay's refusal asks; False when that cannot be."""
        fields = {"price": str(error.fields.get("price", "")), "credit_bytes": error.fields.get("credit_bytes", 0)}
        try:
            terms = Terms.read(fields, self._max_price, self._relay.node)
            needed = str(error.fields.get("needed", ""))[:78]
            owed = Wei(int(needed) if needed.isascii() and needed.isdigit() else 0)
            await asyncio.to_thread(self._purse.fund, self._relay.node, terms, owed)
        except TallystickError as why:
            log.warning("relay %s: %s", self._relay.node, why)
            return False
        return True

