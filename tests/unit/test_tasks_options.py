"""Options of tasks: of the kinds that their signatures say, wherever they come from."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from harness import task_checkpoints as checkpoints
from harness.local_backend import LocalBackend, manifest_of
from tallystick.tasks.cli import perform
from tallystick.tasks.options import check, fits
from tallystick_protocol.errors import ConfigError


@pytest.mark.parametrize(
    "kind, good, bad",
    [(int, [0, -3], [True, 1.0, "1", None]), (float, [1, 0.5], [True, "1", float("nan")]),
     (int | None, [None, 3], ["x"]), (Literal["mean", "cls"], ["cls"], ["max", 0]),
     (Sequence[str] | str, ["a", ["a", "b"], ()], [5, [5]]), (list[list[int]], [[], [[1]]], [5, [5], [["a"]]])],
    ids=str,
)  # fmt: skip
def test_options_are_of_the_kinds_that_tasks_say(kind: Any, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert fits(value, kind)
    for value in bad:
        assert not fits(value, kind)
        with pytest.raises(ConfigError, match="limit="):
            check({"limit": kind}, {"limit": value})


@pytest.mark.parametrize(
    "option", ["stop=5", "truncate=x", "temperature=hot", "bad_words_ids=[5]", "suppress_tokens=[9999]", "seed=x",
               "max_length=x", "forced_eos_token_id=9999", "details=maybe", "verify=perhaps"],
)  # fmt: skip
async def test_options_of_the_command_line_are_told_apart_from_crashes(tmp_path: Path, option: str) -> None:
    folder = checkpoints.llama(tmp_path)
    model = checkpoints.whole(folder, "AutoModelForCausalLM")
    backend = LocalBackend(model, folder, manifest_of(model, folder, "text-generation", "logits"))
    asked = Namespace(
        task="text-generation", text=["Once"], model="", verify="off", set=[option], source_language=None,
        target_language=None,
    )  # fmt: skip
    with pytest.raises(ConfigError):
        await perform(backend, asked)
