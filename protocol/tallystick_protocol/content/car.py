"""CARv1, the stream of blocks that a gateway sends for a whole DAG.

| part    | bytes                                                                                      |
|---------|--------------------------------------------------------------------------------------------|
| header  | varint length, then DAG-CBOR `{"roots": [CID], "version": 1}`                              |
| section | varint length of what follows, the binary CID, the block; repeated to the end              |
"""

from __future__ import annotations

from tallystick_protocol.content.cid import Cid
from tallystick_protocol.content.dag_pb import encode_varint

PROBE_BINARY = bytes((1, 0x55, 0, 0))
"""The binary form of `bafkqaaa`."""


def encode_header(root: bytes) -> bytes:
    """The header for one root, given in its binary form."""
    # CBOR: a map of 2, the text "roots", an array of 1, tag 42, the CID as bytes behind a 0x00; the text "version", 1.
    link = b"\x00" + root
    length = bytes((0x40 | len(link),)) if len(link) < 24 else bytes((0x58, len(link)))
    header = b"\xa2\x65roots\x81\xd8\x2a" + length + link + b"\x67version\x01"
    return encode_varint(len(header)) + header


def encode_section(cid: Cid, block: bytes) -> bytes:
    """One block of the stream."""
    binary = cid.to_bytes()
    return encode_varint(len(binary) + len(block)) + binary + block
