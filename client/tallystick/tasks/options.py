"""Options of the kinds that the tasks say: they are typed by people, and come as JSON from a command line."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Coroutine, Sequence
from types import UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from tallystick_protocol.errors import ConfigError

P = ParamSpec("P")
T = TypeVar("T")


def checked(task: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """The task, which raises ConfigError naming what is not of the type that its signature says."""
    names = list(inspect.signature(task).parameters)

    @functools.wraps(task)
    async def call(*texts: P.args, **options: P.kwargs) -> T:
        check(hints(task), {**dict(zip(names, texts, strict=False)), **options})
        return await task(*texts, **options)

    return call


@functools.cache
def hints(task: Callable[..., Any]) -> dict[str, Any]:
    """What the options of a function are."""
    return get_type_hints(task)


def check(kinds: dict[str, Any], options: dict[str, Any]) -> None:
    """Raises ConfigError for the first option that is not of its kind; those without one are not looked at."""
    for name, value in options.items():
        if name in kinds and not fits(value, kinds[name]):
            kind = kinds[name].__name__ if isinstance(kinds[name], type) else str(kinds[name])
            plain = kind.replace("collections.abc.", "").replace("typing.", "")
            raise ConfigError(f"{name}={str(value)[:60]!r} is not of the kind {plain}")


def fits(value: object, kind: Any) -> bool:
    """Whether a value is of an annotated type: numbers, texts, choices, lists of these, or one of several."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return any(value is each or (type(value) is type(each) and value == each) for each in inner)
    if origin in (list, tuple, Sequence):
        return isinstance(value, list | tuple) and all(fits(each, inner[0]) for each in value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    if kind in (int, str, bool, type(None)):
        return type(value) is kind
    return True
