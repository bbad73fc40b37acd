"""Keystores: never over another file, never readable by others, every failure a sentence."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account

from harness import samples
from tallystick_protocol.errors import ConfigError
from tallystick_protocol.keystore import create_keystore, keystore_address, open_keystore, read_password

PASSWORD = "correct horse"
SECRET = samples.digest("secret")


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture(scope="module")
def keystore_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("keys") / "key.json"
    create_keystore(path, PASSWORD, SECRET, fast=True)
    return path.read_text()


def private_file(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(0o600)
    return path


def test_a_key_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "key.json"
    address = create_keystore(path, PASSWORD, SECRET, fast=True)
    assert open_keystore(path, PASSWORD).secret == SECRET
    assert open_keystore(path, PASSWORD).address == address == keystore_address(path)
    assert bytes(Account.decrypt(json.loads(path.read_text()), PASSWORD)) == SECRET


def test_new_keys_differ(tmp_path: Path) -> None:
    assert create_keystore(tmp_path / "a", PASSWORD, fast=True) != create_keystore(tmp_path / "b", PASSWORD, fast=True)


def test_a_keystore_is_for_its_owner_only_whatever_the_umask(tmp_path: Path, umask: None) -> None:
    create_keystore(tmp_path / "key", PASSWORD, fast=True)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


@pytest.mark.parametrize("kind", ["file", "dangling link", "folder"])
def test_nothing_is_ever_overwritten(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "key"
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="never overwritten"):
        create_keystore(path, PASSWORD, fast=True)
    assert not (tmp_path / "elsewhere").exists()
    if kind == "file":
        assert path.read_text() == "precious"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file"):
        create_keystore(tmp_path / "file" / "key", PASSWORD, fast=True)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610, 0o777])
def test_a_keystore_that_others_can_read_is_refused_with_the_remedy(
    tmp_path: Path, keystore_text: str, mode: int
) -> None:
    path = private_file(tmp_path / "key", keystore_text)
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        open_keystore(path, PASSWORD)


def test_a_wrong_password_is_called_one_and_not_repeated(tmp_path: Path, keystore_text: str) -> None:
    path = private_file(tmp_path / "key", keystore_text)
    with pytest.raises(ConfigError, match="wrong password") as raised:
        open_keystore(path, "hunter2hunter2")
    assert "hunter2" not in str(raised.value)


def test_a_short_password_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fewer than 8"):
        create_keystore(tmp_path / "key", "1234567")
    assert not (tmp_path / "key").exists()


def test_a_missing_keystore_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tallystick-node keys new"):
        open_keystore(tmp_path / "none", PASSWORD)


def changed(text: str, **changes: Any) -> str:
    value = json.loads(text)
    for name, change in changes.items():
        (value if name in value else value["crypto"])[name] = change
    return json.dumps(value)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '"x"', "5", "null", "\xff", '{"version":1}', '{"version":2}', '{"version":4}', "[" * 100_000,
     '{"crypto":null,"version":3}', '{"address":5,"version":3}', '{"address":"zz"}', '{"address":"0x1234"}'],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_what_is_no_keystore_is_a_config_error_and_nothing_else(tmp_path: Path, text: str) -> None:
    path = private_file(tmp_path / "key", text.encode("latin-1"))
    with pytest.raises(ConfigError):
        open_keystore(path, PASSWORD)
    with pytest.raises(ConfigError):
        keystore_address(path)


@pytest.mark.parametrize(
    "changes",
    [{"kdf": "md5"}, {"kdfparams": {}}, {"kdfparams": None}, {"ciphertext": "zz"}, {"ciphertext": ""}, {"mac": 5},
     {"mac": "00" * 32}, {"crypto": []}, {"version": "3"}, {"version": None}],
    ids=str,
)  # fmt: skip
def test_a_damaged_keystore_is_a_config_error_and_nothing_else(
    tmp_path: Path, keystore_text: str, changes: dict[str, Any]
) -> None:
    path = private_file(tmp_path / "key", changed(keystore_text, **changes))
    with pytest.raises(ConfigError):
        open_keystore(path, PASSWORD)


def test_a_password_is_the_first_line_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "p").touch(mode=0o600)
    for text, expected in (("secret\n", "secret"), (" a b \nrest\n", " a b "), ("x", "x"), ("\nx", "")):
        (tmp_path / "p").write_text(text)
        assert read_password(tmp_path / "p") == expected


@pytest.mark.parametrize("data", [b"", b"\xff\xfe"], ids=["empty", "not UTF-8"])
def test_an_unusable_password_file_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "p").write_bytes(data)
    with pytest.raises(ConfigError, match="password file"):
        read_password(tmp_path / "p")
    with pytest.raises(ConfigError, match="password file"):
        read_password(tmp_path / "missing")


def test_a_password_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("secret")
    (tmp_path / "p").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_password(tmp_path / "p")
