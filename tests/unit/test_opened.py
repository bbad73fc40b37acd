"""What a client demands of the answer to an opening: that this node's hot key has signed this very one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from harness import samples
from tallystick.payments import Purse
from tallystick.session.remote import Opening, Remote
from tallystick_protocol.errors import BadSignature, Rejected
from tallystick_protocol.frames import Frame, Kind
from tallystick_protocol.messages import Opened, SessionOpen
from tallystick_protocol.signing import Domain, Key, digest, seal, unseal
from tallystick_protocol.types import ZERO32, ZERO_ADDRESS, Wei

HOT = samples.key("node")
CANDIDATE = samples.candidate("node", 0, 2)
SPKI = samples.digest("the key that was seen in the handshake")
Answer = Callable[[SessionOpen], tuple[dict[str, Any], Key, Domain]]


class Answering:
    """A node that answers an opening as it is told."""

    peer, spki = "node", SPKI

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._asked: SessionOpen | None = None
        self.is_open = True

    async def send(self, frame: Frame) -> None:
        self._asked, _ = unseal(samples.STAKING, SessionOpen, frame.body["open"])

    async def receive(self) -> Frame:
        assert self._asked is not None
        said, key, domain = self._answer(self._asked)
        honest = {"open": digest(samples.STAKING, self._asked), "spki": SPKI, "credit": CANDIDATE.offer.credit}
        opened = Opened(**{**honest, "expires": self._asked.expires, **said})
        return Frame(Kind.OPENED, {"opened": seal(domain, opened, key), "owed": "0", "voucher": b"", "lease_s": 30.0})

    async def close(self) -> None:
        self.is_open = False


def ask(answer: Answer) -> tuple[Remote | None, Answering]:
    """Open a session there. Raises what the client says of the answer."""
    channel, client = Answering(answer), samples.key("client")
    chain: Any = SimpleNamespace(book=SimpleNamespace(escrow_domain=samples.ESCROW, chain_id=31337))
    opening = Opening(samples.digest("nonce"), samples.MODEL, 4, 0, ZERO_ADDRESS, ZERO_ADDRESS, 4096, 8)

    async def connect(*_: Any) -> Any:
        return channel

    async def run() -> Remote:
        peers: Any = SimpleNamespace(connect=connect)
        purse = Purse(chain, client, Wei(1000))
        return await Remote.open(peers, CANDIDATE, opening, client, samples.STAKING, purse)

    try:
        return asyncio.run(run()), channel
    except Exception:
        assert not channel.is_open, "the connection was left open"
        raise


def test_the_hot_keys_answer_to_this_opening_is_taken() -> None:
    remote, channel = ask(lambda asked: ({}, HOT, samples.STAKING))
    assert remote is not None and channel.is_open


BAD: dict[str, Answer] = {
    "signed by another key": lambda asked: ({}, samples.key("stranger"), samples.STAKING),
    "signed by the client": lambda asked: ({}, samples.key("client"), samples.STAKING),
    "signed for another contract": lambda asked: ({}, HOT, samples.ESCROW),
    "to another opening": lambda asked: ({"open": samples.digest("another")}, HOT, samples.STAKING),
    "seen over another TLS key": lambda asked: ({"spki": samples.digest("yesterday's")}, HOT, samples.STAKING),
    "seen over no TLS": lambda asked: ({"spki": ZERO32}, HOT, samples.STAKING),
    "with less credit than offered": lambda asked: ({"credit": CANDIDATE.offer.credit - 1}, HOT, samples.STAKING),
}


@pytest.mark.parametrize("what", BAD)
def test_any_other_answer_is_refused(what: str) -> None:
    with pytest.raises((Rejected, BadSignature)):
        ask(BAD[what])
