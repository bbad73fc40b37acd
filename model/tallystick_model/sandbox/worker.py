"""The process that `limited.ask` starts: takes one task from standard input, limits itself, answers on standard output.

Its limits hold before anything that a stranger wrote is read.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from collections.abc import Callable
from typing import Any


def _tokenizer(request: dict[str, Any]) -> Any:
    from tallystick_model.sandbox.tokenizers import examine

    return examine(request)


def _chat_template(request: dict[str, Any]) -> Any:
    from tallystick_model.sandbox.templates import render

    return render(request)


def _conversion(request: dict[str, Any]) -> Any:
    from tallystick_model.sandbox.conversion import convert

    return convert(request)


TASKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "tokenizer.json": _tokenizer,
    "chat template": _chat_template,
    "tokenizer conversion": _conversion,
}


def main() -> None:
    question = json.load(sys.stdin)
    limits = question["limits"]
    _limit(resource.RLIMIT_CPU, limits["cpu_s"])
    with contextlib.suppress(ValueError, OSError):  # macOS does not limit the address space
        _limit(resource.RLIMIT_AS, limits["memory_bytes"])
    _limit(resource.RLIMIT_CORE, 0)
    if question["task"] != "tokenizer conversion":  # it writes the files that it is asked for
        _limit(resource.RLIMIT_FSIZE, 0)
    answer: dict[str, Any]
    try:
        answer = {"answer": TASKS[question["task"]](question["request"])}
    except MemoryError:
        answer = {"error": f"it takes more than {limits['memory_bytes'] >> 20} MiB of memory"}
    except BaseException as error:  # noqa: BLE001 - whatever a stranger's file does becomes one sentence
        answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
    sys.stdout.write(json.dumps(answer))


def _limit(what: int, value: int) -> None:
    resource.setrlimit(what, (value, value))


if __name__ == "__main__":
    main()
