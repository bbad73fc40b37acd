"""The node's settings: precedence, and no typo that means "default"."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tallystick_node.config import ENV_PREFIX, NodeConfig, load_config
from tallystick_protocol.errors import ConfigError
from tallystick_protocol.types import Span

NEEDED = {"hot_key": "hot.json"}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith(ENV_PREFIX):
            monkeypatch.delenv(name)


def config_file(tmp_path: Path, text: str) -> Path:
    (tmp_path / "node.toml").write_text(text)
    return tmp_path / "node.toml"


def test_flags_go_before_environment_before_file_before_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_config(None, NEEDED).port == 0
    path = config_file(tmp_path, "port = 1\n")
    assert load_config(path, NEEDED).port == 1
    monkeypatch.setenv("TALLYSTICK_NODE_PORT", "2")
    assert load_config(path, NEEDED).port == 2
    assert load_config(path, {**NEEDED, "port": "3"}).port == 3


def test_each_source_may_give_what_another_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALLYSTICK_NODE_SPAN", "1:2")
    config = load_config(config_file(tmp_path, 'hot_key = "k"\nsources = ["http://a"]\n'), {"price": "7"})
    assert (config.layers, config.hot_key, config.sources, config.price) == (Span(1, 2), Path("k"), ["http://a"], 7)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("port = 1\npor = 2\n", "2: 'por'"),
        ("\n\n  prices = 2\n", "3: 'prices'"),
        ('"bogus" = 1\n', "1: 'bogus'"),
        ("'bogus' = 1\n", "1: 'bogus'"),
        ("port = 1\n[bogus]\nx = 1\n", "2: 'bogus'"),
        ("[[ bogus ]]\nx = 1\n", "1: 'bogus'"),
        ("bogus.x = 1\n", "1: 'bogus'"),
        ("# bogus = 1\nbogus=1\n", "2: 'bogus'"),
        ("Port = 1\n", "1: 'Port'"),
    ],
)
def test_an_unknown_key_is_refused_with_its_file_and_line(tmp_path: Path, text: str, where: str) -> None:
    path = config_file(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        load_config(path, NEEDED)
    assert f"{path}:{where} is no setting" in str(raised.value)


@pytest.mark.parametrize(
    "name", ["TALLYSTICK_NODE_PRT", "tallystick_node_prt", "TALLYSTICK_NODE_", "TALLYSTICK_NODE_PORT_"]
)
def test_an_unknown_variable_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match=f"sets {name},"):
        load_config(None, NEEDED)


def test_variables_of_other_programs_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALLYSTICK_KEY", "x")
    monkeypatch.setenv("PORT", "5")
    assert load_config(None, NEEDED).port == 0


def test_an_unknown_flag_is_refused() -> None:
    with pytest.raises(ConfigError, match="bogus"):
        load_config(None, {**NEEDED, "bogus": 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "'x'"),
        ("port", "-1"),
        ("port", "65536"),
        ("port", "true"),
        ("port", "1.5"),
        ("port", "[1]"),
        ("stake", "1e23"),
        ("stake", "-1"),
        ("price", "true"),
        ("redeem_after_s", "nan"),
        ("redeem_after_s", "0.1"),
        ("sources", "'http://a'"),
        ("sources", "[1]"),
        ("log_level", "'INFO'"),
        ("threads", "-1"),
        ("credit_positions", "127"),
        ("node", "'0x12'"),
        ("payee", "'somebody'"),
        ("operator", "5"),
        ("hot_key", "5"),
    ],
)
def test_a_wrong_value_is_refused_by_name(tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        load_config(config_file(tmp_path, f"{name} = {value}\n"), {k: v for k, v in NEEDED.items() if k != name})


@pytest.mark.parametrize("value", ["", "x", "1.5", "-5", "true"])
def test_a_wrong_value_in_the_environment_is_refused_by_name(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALLYSTICK_NODE_PORT", value)
    with pytest.raises(ConfigError, match="port"):
        load_config(None, NEEDED)


def test_a_list_in_the_environment_is_json_and_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALLYSTICK_NODE_SOURCES", '["http://a", "http://b"]')
    assert load_config(None, NEEDED).sources == ["http://a", "http://b"]
    monkeypatch.setenv("TALLYSTICK_NODE_SOURCES", "http://a")
    with pytest.raises(ConfigError, match=r"sources.*JSON"):
        load_config(None, NEEDED)


@pytest.mark.parametrize("missing", NEEDED)
def test_what_has_no_default_is_asked_for_by_name(missing: str) -> None:
    with pytest.raises(ConfigError, match=missing):
        load_config(None, {name: value for name, value in NEEDED.items() if name != missing})


@pytest.mark.parametrize(("text", "span"), [("0:3", Span(0, 3)), ("3:12", Span(3, 12)), ("00:1", Span(0, 1))])
def test_a_span_is_start_colon_end(text: str, span: Span) -> None:
    assert load_config(None, {**NEEDED, "span": text}).layers == span


def test_without_a_span_the_node_chooses_one() -> None:
    assert load_config(None, NEEDED).layers is None


def test_ranks_are_asked_for_together_with_stock_execution() -> None:
    with pytest.raises(ConfigError, match="stock"):
        load_config(None, {**NEEDED, "tensor_parallel": "2"})
    assert load_config(None, {**NEEDED, "tensor_parallel": "2", "execution": "stock"}).tensor_parallel == 2


@pytest.mark.parametrize(
    "text",
    ["", ":", "0:", ":3", "3", "3:0", "3:3", "-1:3", "0-3", "0:3:5", " 0:3", "0:3\n", "²:³", "٠:٣", "a:b", "0x0:0x3"],
)
def test_everything_else_is_no_span_and_the_error_shows_one(text: str) -> None:
    with pytest.raises(ConfigError, match="for example 0:3"):
        _ = load_config(None, {**NEEDED, "span": text}).layers


def test_addresses_are_taken_in_any_case_and_kept_in_one() -> None:
    spelled = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"
    config = load_config(None, {**NEEDED, "node": spelled.lower(), "payee": spelled, "operator": ""})
    assert (config.node, config.payee, config.operator) == (spelled, spelled, "")


@pytest.mark.parametrize("data", [b"port = ", b"= 1", b"\xff", b"port = 1\nport = 2"], ids=repr)
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "node.toml").write_bytes(data)
    with pytest.raises(ConfigError, match=r"node\.toml is not TOML"):
        load_config(tmp_path / "node.toml", NEEDED)


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / name, NEEDED)


def test_settings_cannot_be_changed_afterwards() -> None:
    config: Any = load_config(None, NEEDED)
    with pytest.raises(ValueError, match="frozen"):
        config.port = 5


def test_every_setting_says_what_it_is() -> None:
    assert all(field.description for field in NodeConfig.model_fields.values())
