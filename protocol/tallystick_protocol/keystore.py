"""Keystore V3 files: how keys lie on disk, and how they are opened."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

from eth_account import Account

from tallystick_protocol import canonical_json
from tallystick_protocol.errors import BadMessage, ConfigError
from tallystick_protocol.signing import Key, address_bytes, checksum_address
from tallystick_protocol.types import Address

MIN_PASSWORD = 8


def create_keystore(path: Path, password: str, secret: bytes | None = None, fast: bool = False) -> Address:
    """Write a keystore for a new key (or this secret), mode 0600, never over an existing file; reads it back.

    fast: a weaker key derivation, for throw-away local networks only.
    """
    if len(password) < MIN_PASSWORD:
        raise ConfigError(f"the password has fewer than {MIN_PASSWORD} characters")
    key = Key(secret if secret is not None else os.urandom(32))
    kdf = {"kdf": "pbkdf2", "iterations": 1000} if fast else {}
    keystore = Account.encrypt(key.secret, password, **kdf)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            json.dump(keystore, file)
    except FileExistsError:
        raise ConfigError(f"{path} exists already; keys are never overwritten") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror})") from None
    if open_keystore(path, password).address != key.address:
        raise ConfigError(f"{path} does not open again; the disk may be failing")
    return key.address


def open_keystore(path: Path, password: str) -> Key:
    """Raises ConfigError: no such file, readable by others, wrong password."""
    try:
        mode = path.stat().st_mode
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the keystore {path} cannot be read ({error}); make one: tallystick-node keys new") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"the keystore {path} can be read by others; run: chmod 600 {path}")
    try:
        return Key(bytes(Account.decrypt(canonical_json.parse(text.encode()), password)))
    except ValueError as error:
        reason = "wrong password" if "MAC mismatch" in str(error) else f"not a keystore V3 file ({error})"
        raise ConfigError(f"the keystore {path} does not open: {reason}") from None
    except (KeyError, TypeError, AttributeError, NotImplementedError):
        raise ConfigError(f"{path} is not a keystore V3 file") from None


def keystore_address(path: Path) -> Address:
    """The address that a keystore says it is for, without opening it."""
    try:
        text = str(canonical_json.parse(path.read_bytes())["address"])
        return checksum_address(address_bytes(Address("0x" + text.removeprefix("0x"))))
    except (OSError, ValueError, KeyError, TypeError, BadMessage) as error:
        raise ConfigError(f"the keystore {path} names no address ({type(error).__name__})") from None


def read_password(path: Path) -> str:
    """The first line of a password file. Raises ConfigError, also when others can read it."""
    try:
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(f"the password file {path} can be read by others; run: chmod 600 {path}")
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the password file {path} cannot be read ({error})") from None
    if not lines:
        raise ConfigError(f"the password file {path} is empty")
    return lines[0]
