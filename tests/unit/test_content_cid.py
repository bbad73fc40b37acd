"""Content ids: one spelling per block, everything else refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tallystick_protocol.content.cid import Cid, Codec
from tallystick_protocol.errors import BadBlock, BadCid

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "cids.json").read_text())


@pytest.mark.parametrize("case", VECTORS["spellings"], ids=lambda case: case["text"][:12])
def test_reads_every_known_spelling_and_writes_base32(case: dict[str, str]) -> None:
    assert str(Cid.parse(case["text"])) == case["cid"]


@pytest.mark.parametrize("case", VECTORS["invalid"], ids=lambda case: case["why"])
def test_refuses_every_other_spelling(case: dict[str, str]) -> None:
    with pytest.raises(BadCid):
        Cid.parse(case["text"])


def test_a_cid_is_the_hash_of_its_block() -> None:
    cid = Cid.of_raw(b"hello world")
    cid.check(b"hello world")
    with pytest.raises(BadBlock, match="not block bafkrei"):
        cid.check(b"hello worle")


def test_binary_and_text_forms_agree() -> None:
    for codec in Codec:
        cid = Cid.of(b"x", codec)
        assert Cid.from_bytes(cid.to_bytes()) == Cid.parse(str(cid)) == cid
        assert len(str(cid)) == 59


def test_a_digest_has_32_bytes() -> None:
    with pytest.raises(BadCid, match="32 bytes, not 31"):
        Cid(Codec.RAW, b"x" * 31)


def test_reasons_name_what_was_found() -> None:
    digest = bytes(32)
    for binary, reason in (
        (bytes((1, 0x71, 0x12, 0x20)) + digest, "codec 0x71"),
        (bytes((1, 0x55, 0x00, 0x00)), "identity"),
        (bytes((1, 0x55, 0x1E, 0x20)) + digest, "sha2-256"),
        (bytes((1, 0x55, 0x12, 0x20)) + digest + b"\0", "not 37"),
        (b"", "version"),
    ):
        with pytest.raises(BadCid, match=reason):
            Cid.from_bytes(binary)
