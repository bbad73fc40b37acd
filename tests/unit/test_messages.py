"""Session ids and offers."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from harness import samples
from tallystick_protocol.errors import BadMessage
from tallystick_protocol.messages import (
    Offer,
    SessionOpen,
    session_id,
)
from tallystick_protocol.signing import address_bytes, from_words, to_words
from tallystick_protocol.types import ModelId


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def addrs(*entries: dict[str, Any]) -> bytes:
    return canonical({"addrs": list(entries)})


def test_a_session_id_is_the_hash_that_the_rulings_say() -> None:
    client, nonce = samples.address("client"), samples.digest("nonce")
    expected = hashlib.sha256((31337).to_bytes(32, "big") + address_bytes(client) + nonce + samples.MODEL).digest()
    assert session_id(31337, client, nonce, samples.MODEL) == expected


def test_a_session_id_differs_for_every_chain_client_nonce_and_model() -> None:
    ids = {
        session_id(chain, samples.address(client), samples.digest(nonce), ModelId(samples.digest(model)))
        for chain in (1, 31337)
        for client in ("a", "b")
        for nonce in ("a", "b")
        for model in ("a", "b")
    }
    assert len(ids) == 16


@pytest.mark.parametrize("cls", [Offer, SessionOpen])
def test_an_offer_or_opening_for_no_layers_is_refused_at_the_edge(cls: type) -> None:
    value = next(value for value in samples.structs() if type(value) is cls)
    values = {name: getattr(value, name) for name in cls.__slots__}  # type: ignore[attr-defined]
    for start, end in ((2, 2), (3, 2), (0, 0)):
        with pytest.raises(BadMessage, match="not a span"):
            from_words(cls, to_words(samples.unchecked(cls, {**values, "start": start, "end": end})))
