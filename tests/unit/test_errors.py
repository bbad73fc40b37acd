"""The error tree: stable codes, a bounded way over the wire, nothing a peer says taken as it is."""

from __future__ import annotations

import re
from typing import Any

import pytest

import tallystick_node.journal  # noqa: F401 - defines an error of its own
from tallystick_protocol import errors
from tallystick_protocol.errors import (
    BlockMissing,
    Overloaded,
    PaymentRequired,
    TallystickError,
    error_codes,
    from_wire,
)
from tallystick_protocol.frames import Frame
from tallystick_protocol.peer import error_frame


def tree(base: type[TallystickError]) -> list[type[TallystickError]]:
    return [base, *(deeper for child in base.__subclasses__() for deeper in tree(child))]


def make(cls: type[TallystickError]) -> TallystickError:
    return cls("a sentence", node="0x12", retry_after_s=1.5) if cls is not BlockMissing else BlockMissing("cid", ["a"])


def test_every_code_is_unique_and_a_plain_word() -> None:
    codes = [cls.code for cls in tree(TallystickError)]
    assert len(codes) == len(set(codes))
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", code) for code in codes)
    assert set(error_codes()) == set(codes)


def test_every_class_has_a_code_of_its_own_and_an_http_status() -> None:
    for cls in tree(TallystickError):
        assert "code" in vars(cls)
        assert 400 <= cls.status < 600


def test_the_tree_in_the_docstring_names_every_class() -> None:
    drawn = set(re.findall(r"\b[A-Z][a-zA-Z]+\b", errors.__doc__ or ""))
    defined = {cls.__name__ for cls in tree(TallystickError) if cls.__module__ == errors.__name__}
    assert defined - drawn == set()


@pytest.mark.parametrize("cls", tree(TallystickError), ids=lambda cls: cls.code)
def test_every_error_comes_over_the_wire_as_it_was(cls: type[TallystickError]) -> None:
    error = make(cls)
    again = from_wire(Frame.decode(error_frame(error.code, error.message, error.fields).encode()).body)
    assert type(again) is cls
    assert (again.code, again.message, str(again)) == (error.code, error.message, str(error))
    assert set(again.fields) == set(error.fields)
    direct = from_wire(error.to_wire())
    assert (type(direct), direct.message) == (cls, error.message)


def test_fields_keep_their_numbers() -> None:
    assert from_wire(Overloaded("full", retry_after_s=1.5, sessions=3).to_wire()).fields == {
        "retry_after_s": 1.5,
        "sessions": 3,
    }


@pytest.mark.parametrize(
    "value", [None, ["a"], {"a": 1}, b"\xff", 1 << 70, -(1 << 70), "x" * 100, object(), float("nan"), True], ids=repr
)
def test_any_field_of_our_own_fits_into_an_error_frame(value: Any) -> None:
    body = Frame.decode(error_frame("rejected", "no", {"field": value}).encode()).body
    assert isinstance(from_wire(body), errors.Rejected)


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"code": None},
        {"code": 5, "message": 5},
        {"code": ["a"], "message": {"a": 1}},
        {"code": "x" * 10**6, "message": "x" * 10**6},
        {"self": 1, "cls": 2, "message": "m", "body": 3, "error": 4, "args": 5, "code": "rejected"},
        {"fields": {"a": 1}, "with_traceback": 1, "__class__": 1},
        {f"k{i}": "v" for i in range(1000)},
        {"k" * 10**5: "v" * 10**5},
        {"k": nested(50_000)},
        {"code": nested(50_000), "message": nested(50_000)},
        {"k": float("nan"), "j": float("inf"), "i": 10**4000},
        {1: 2, None: 3, (1, 2): 4},
        {"message": "\x1b[2J\x1b]0;owned\x07\r\n\u202eevil", "k\x1b": "\x1b[31m"},
        {"message": "\ud800"},
    ],
    ids=lambda body: str(list(body))[:40],
)
def test_a_hostile_body_becomes_a_small_printable_error(body: dict[Any, Any]) -> None:
    error = from_wire(body)
    assert isinstance(error, TallystickError)
    assert len(error.message) <= 500
    assert str(error).isprintable()
    assert len(error.fields) <= 16
    for key, value in error.fields.items():
        assert len(key) <= 40
        assert key.isprintable()
        assert len(repr(value)) <= 210
        if isinstance(value, str):
            assert value.isprintable()
        else:
            assert abs(value) < 1 << 64


def test_an_unknown_code_becomes_the_base_class() -> None:
    assert type(from_wire({"code": "from_the_future", "message": "m"})) is TallystickError


def test_a_subclass_is_caught_as_its_parent() -> None:
    with pytest.raises(errors.ProtocolError):
        raise from_wire(PaymentRequired("pay").to_wire())
