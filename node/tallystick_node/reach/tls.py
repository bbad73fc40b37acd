"""The node's TLS keys: one in use and the next one, so that a key is replaced without anybody noticing.

They lie in numbered PEM files; the lower number is in use. Both are named in the Reach, so after a rotation the key in
use is one that everybody knows already. A TLS key is no identity: losing both means signing another Reach.
"""

from __future__ import annotations

import logging
import os
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from tallystick_protocol.errors import ConfigError
from tallystick_protocol.transport.pins import server_context, spki_of
from tallystick_protocol.types import Digest

log = logging.getLogger(__name__)

_CENTURY = timedelta(days=36500)
_EPOCH = datetime(2020, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Identity:
    """A key in use: what new connections are shaken hands with, and its hash."""

    context: ssl.SSLContext
    spki: Digest


class TlsKeys:
    """The keys in a folder, made when they are missing."""

    def __init__(self, folder: Path, names: frozenset[str], clock: Callable[[], float] = time.time) -> None:
        """names: the SNI values that are answered. Raises ConfigError when the folder cannot be used."""
        self._folder = folder
        self._names = names
        self._clock = clock
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            while len(self._numbers()) < 2:
                self._make(max(self._numbers(), default=0) + 1)
            self._load()
        except (OSError, ValueError) as error:
            raise ConfigError(f"the TLS keys in {folder} cannot be used ({error}); remove it to make others") from None

    @property
    def age_s(self) -> float:
        """How long the next key has existed: keys are rotated by it."""
        return self._clock() - self._path(self._numbers()[-1]).stat().st_mtime

    def rotate(self) -> None:
        """The next key is used for connections from now on, and another one made to follow it. Sign a Reach then."""
        numbers = self._numbers()
        self._make(numbers[-1] + 1)  # the one write that counts: the two highest numbers hold
        for number in numbers[:-1]:
            self._path(number).unlink()
        self._load()
        log.info("the TLS key is %s, the next one %s", self.pins[0].hex()[:12], self.pins[1].hex()[:12])

    def _load(self) -> None:
        current, following = self._numbers()[-2:]
        paths = self._path(current), self._path(following)
        self.pins = tuple(spki_of(ssl.PEM_cert_to_DER_cert(_certificate(path.read_text()))) for path in paths)
        self.current = Identity(server_context(str(paths[0]), self._names), self.pins[0])

    def _numbers(self) -> list[int]:
        return sorted(int(path.stem) for path in self._folder.glob("*.pem") if path.stem.isdigit())

    def _path(self, number: int) -> Path:
        return self._folder / f"{number}.pem"

    def _make(self, number: int) -> None:
        """A P-256 key and a certificate over it that says nothing."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tallystick")])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(_EPOCH)
            .not_valid_after(_EPOCH + _CENTURY)
            .sign(key, hashes.SHA256())
        )
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        pem += certificate.public_bytes(Encoding.PEM)
        part = self._folder / f"{number}.part"
        part.unlink(missing_ok=True)
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        part.rename(self._path(number))


def _certificate(pem: str) -> str:
    return pem[pem.index("-----BEGIN CERTIFICATE") :]
