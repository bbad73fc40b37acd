"""TLS 1.3 by pinned keys: no certificate authority, no host names; a wrong key fails inside the handshake.

A node's certificate is self-signed and says nothing. What counts is SHA-256 of its SubjectPublicKeyInfo, which the
node's hot key has signed (`reach`). `SSLContext.sslobject_class` is where asyncio and uvloop let the comparison happen
before a byte of request is written; nothing is ever resumed, so the certificate is seen on every connection.
"""

from __future__ import annotations

import hashlib
import ssl
from functools import lru_cache
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tallystick_protocol.types import ZERO32, Digest


class WrongKey(ssl.SSLCertVerificationError):
    """The peer shows another key than the ones it is known by."""


def spki_of(certificate: bytes) -> Digest:
    """SHA-256 of the SubjectPublicKeyInfo of a DER certificate. Raises ValueError for what is none."""
    try:
        key = x509.load_der_x509_certificate(certificate).public_key()
    except UnsupportedAlgorithm as error:
        raise ValueError(f"a key of an unknown kind ({error})") from None
    return Digest(hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest())


def shown_key(connection: Any) -> Digest:
    """The hash of the key that the other side has shown, from a connection's `ssl_object`; zero for a plain one."""
    if connection is None:
        return ZERO32
    certificate = connection.getpeercert(True)
    return spki_of(certificate) if certificate else ZERO32


@lru_cache(maxsize=1024)
def pinned_context(pins: frozenset[bytes]) -> ssl.SSLContext:
    """A client's context: the handshake itself fails with WrongKey unless the peer's key is one of `pins`."""
    if not pins:
        raise ValueError("a pinned context takes a pin")

    class Pinned(ssl.SSLObject):
        def do_handshake(self) -> None:
            super().do_handshake()
            certificate = self.getpeercert(True)
            try:
                known = certificate is not None and spki_of(certificate) in pins
            except ValueError:
                known = False
            if not known:
                raise WrongKey("the peer shows another key than its Reach names")

    context = _client_context()
    context.sslobject_class = Pinned
    return context


@lru_cache(maxsize=1)
def any_key_context() -> ssl.SSLContext:
    """A client's context that takes any key: for what is checked by signature or hash alone (Reach records, blocks)."""
    return _client_context()


def server_context(certificate: str, names: frozenset[str]) -> ssl.SSLContext:
    """A server's context. certificate: a PEM file with key and certificate; names: the SNI values that are answered."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    context.load_cert_chain(certificate)

    def check(_: ssl.SSLObject, name: str | None, __: ssl.SSLContext) -> int | None:
        return None if name in names else ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME

    context.sni_callback = check
    return context


def _client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context
