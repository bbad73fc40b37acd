"""`tallystick run TASK TEXT…`: the tasks on the command line."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import numpy as np

from tallystick.routing.candidates import Candidate
from tallystick.tasks.backend import Answers, Backend
from tallystick.tasks.classification import text_classification, token_classification
from tallystick.tasks.features import feature_extraction
from tallystick.tasks.fill_mask import fill_mask
from tallystick.tasks.question_answering import question_answering
from tallystick.tasks.text2text import summarization, translation
from tallystick.tasks.text_generation import text_generation
from tallystick.verdict import Verdict
from tallystick_protocol.errors import ConfigError

TASKS: dict[str, Callable[..., Coroutine[Any, Any, Answers[Any]]]] = {
    "text-generation": text_generation,
    "fill-mask": fill_mask,
    "text-classification": text_classification,
    "token-classification": token_classification,
    "question-answering": question_answering,
    "summarization": summarization,
    "translation": translation,
    "feature-extraction": feature_extraction,
}
_TEXTS = {"question-answering": 2}
"""How many texts a task takes, if not one."""


def add(commands: Any, open_client: Callable[[argparse.Namespace], Any]) -> None:
    """Add the command `run`. open_client: an async context manager that is a client, made of the parsed options."""
    run = commands.add_parser("run", help="a task on a text: " + ", ".join(TASKS))
    run.add_argument("task", choices=list(TASKS))
    run.add_argument("text", nargs="+", help="the text; for question-answering the question and the context")
    run.add_argument("--model", default="", help="id, part of an id or name; default: the only one")
    run.add_argument("--source-language", help="of a translation, in the model's own codes")
    run.add_argument("--target-language")
    run.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any other option of the task; JSON or text"
    )
    run.add_argument("--verify", choices=["off", "audit", "full"], default="audit")
    run.add_argument("--json", action="store_true", help="one JSON object with route and verdict")

    async def command(options: argparse.Namespace) -> int:
        async with open_client(options) as client:
            answers = await perform(client, options)
        print(json.dumps(_full(answers)) if options.json else _short(options.task, answers))
        return 0

    run.set_defaults(command=command)


async def perform(client: Backend, options: argparse.Namespace) -> Answers[Any]:
    """Do what the options say. Raises ConfigError for a wrong number of texts or an unknown option."""
    wanted = _TEXTS.get(options.task, 1)
    if len(options.text) != wanted:
        raise ConfigError(f"{options.task} takes {wanted} text(s), not {len(options.text)}: put each into quotes")
    settings = {"model": options.model, "verify": options.verify, **dict(map(_setting, options.set))}
    for name, value in (("src_lang", options.source_language), ("tgt_lang", options.target_language)):
        if value is not None:
            settings[name] = value
    task = TASKS[options.task]
    taken = inspect.signature(task).parameters
    unknown = set() if "settings" in taken else set(settings) - set(taken)
    if unknown:
        raise ConfigError(f"{options.task} has no option {sorted(unknown)}; it has {', '.join(list(taken)[2:])}")
    return await task(client, *options.text, **settings)


def _setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE; the value is read as JSON where it is some."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ConfigError(f"--set {text[:60]!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _full(answers: Answers[Any]) -> dict[str, Any]:
    return {"results": [_plain(result) for result in answers], **told(answers.route, answers.verdict)}


def told(route: Iterable[Candidate], verdict: Verdict) -> dict[str, Any]:
    """What carried an answer, and the verdict on it, as plain values."""
    return {
        "route": [{"node": hop.node, "layers": [hop.span.start, hop.span.end]} for hop in route],
        "verify": verdict.policy,
        "verdict": verdict.to_json(),
        "receipts": verdict.receipts,
        "checks": {"passed": verdict.passed, "failed": verdict.failed},
        "caught": [accusation.node for accusation in verdict.accusations],
        "paid_wei": sum(verdict.paid.values()),
    }


def _plain(result: Any) -> Any:
    return result.tolist() if isinstance(result, np.ndarray) else result


def _short(task: str, answers: Answers[Any]) -> str:
    """Generated texts as they are, everything else as one JSON value a line."""
    key = {"text-generation": "generated_text", "summarization": "summary_text", "translation": "translation_text"}
    if task in key:
        return "\n".join(str(result[key[task]]) for result in answers)
    return "\n".join(json.dumps(_plain(result), ensure_ascii=False) for result in answers)
