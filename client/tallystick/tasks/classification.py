"""Classifying texts and tokens: the labels a classifier was trained with, their scores, and where in the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from tallystick.routing.candidates import Candidate
from tallystick.tasks.backend import Answers, Backend, Served, TaskAnswers, look_up, merge
from tallystick.tasks.options import checked
from tallystick.tasks.passes import analyse, longest, one_pass
from tallystick.tasks.processors import log_softmax
from tallystick.tokens import Encoding
from tallystick.verdict import Policy, Verdict
from tallystick_protocol.errors import ConfigError

Function = Literal["softmax", "sigmoid", "none"]
Aggregation = Literal["none", "simple", "first", "average", "max"]


@checked
async def text_classification(
    backend: Backend,
    text: str,
    *,
    pair: str | None = None,
    model: str = "",
    top_k: int | None = None,
    function_to_apply: Function | None = None,
    truncate: bool = False,
    verify: Policy = "audit",
) -> TaskAnswers:
    """[{"label", "score"}], the highest score first. pair: a second text, for models that compare two.

    function_to_apply: how scores become probabilities; by default as the model's problem type says: softmax over
    several labels, sigmoid over labels that do not exclude each other, none for a regression. Raises ConfigError.
    """
    served = await look_up(backend, model, ("label",), "a label for a text")
    encoding = analyse(served, text, pair, truncate)
    rows, route, verdict = await one_pass(backend, served, encoding, None, verify)
    scores = apply(function_to_apply or problem(served), rows[0])
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k={top_k} is not at least 1")
    order = np.argsort(-scores, kind="stable")[:top_k]
    labels = served.manifest.labels
    return Answers([{"label": labels[i], "score": float(scores[i])} for i in order.tolist()], route, verdict)


def problem(served: Served) -> Function:
    """What a classifier's problem type makes of its scores, as transformers' pipeline has it."""
    kind = served.manifest.config.get("problem_type")
    if kind == "regression":
        return "none"
    return "sigmoid" if kind == "multi_label_classification" or len(served.manifest.labels) == 1 else "softmax"


def apply(function: Function, scores: np.ndarray) -> np.ndarray:
    """Scores (labels,) as float64: as they are, each as a probability of its own, or all as one distribution."""
    if function not in get_args(Function):
        raise ConfigError(f"function_to_apply={function!r} is not one of {', '.join(get_args(Function))}")
    wide = scores.astype(np.float64)
    if function == "none":
        return wide
    if function == "sigmoid":
        return np.asarray(0.5 * (1.0 + np.tanh(0.5 * wide)))
    return np.asarray(np.exp(log_softmax(scores).astype(np.float64)))


@checked
async def token_classification(
    backend: Backend,
    text: str,
    *,
    model: str = "",
    aggregation_strategy: Aggregation = "none",
    ignore_labels: Sequence[str] = ("O",),
    stride: int | None = None,
    verify: Policy = "audit",
) -> TaskAnswers:
    """The entities of a text, with [start, end) in characters.

    "none": [{"entity", "score", "index", "word", "start", "end"}], one for each token. Otherwise neighbours of one
    entity are joined: [{"entity_group", "score", "word", "start", "end"}]; "simple" takes each token's label, "first",
    "average" and "max" give all tokens of a word one label. stride: read a long text in overlapping windows that
    share so many tokens; what is found twice counts once. Raises ConfigError.
    """
    served = await look_up(backend, model, ("scores",), "a label for each token")
    if aggregation_strategy not in get_args(Aggregation):
        raise ConfigError(f"aggregation_strategy={aggregation_strategy!r} is not one of {get_args(Aggregation)}")
    if stride is None:
        windows = [served.tokens.analyse(text)]
    elif aggregation_strategy == "none":
        raise ConfigError('windows are joined by entities: take aggregation_strategy="simple" with a stride')
    else:
        windows = served.tokens.windows(text, None, longest(served), stride)
    found: list[dict[str, Any]] = []
    route: list[Candidate] = []
    verdicts: list[Verdict] = []
    for window in windows:
        rows, route, verdict = await one_pass(backend, served, window, None, verify)
        verdicts.append(verdict)
        read = _read(served, text, window, np.exp(log_softmax(rows)))
        if aggregation_strategy == "none":
            entities = [_entity(served, token) for token in read]
        elif aggregation_strategy == "simple":
            entities = _groups(served, [_entity(served, token) for token in read])
        else:
            entities = _groups(served, [_word(served, word, aggregation_strategy) for word in _words(read)])
        found += [e for e in entities if e.get("entity", e.get("entity_group")) not in ignore_labels]
    return Answers(_without_overlaps(found) if len(windows) > 1 else found, route, merge(verdicts))


def _read(served: Served, text: str, window: Encoding, scores: np.ndarray) -> list[dict[str, Any]]:
    """The tokens that stand for text, each with its scores and whether it goes on the word before it."""
    tokens = served.tokens
    unknown = tokens.special_token("unk")
    read = []
    for index, (token, (start, end)) in enumerate(zip(window.ids, window.offsets, strict=True)):
        if window.special[index]:
            continue
        word = tokens.token_of(token)
        goes_on = start > 0 and " " not in text[start - 1 : start + 1]
        if tokens.marks_subwords:
            goes_on = len(word) != end - start
        if word == unknown:
            word, goes_on = text[start:end], False
        read.append(
            {"word": word, "scores": scores[index], "start": start, "end": end, "index": index, "goes_on": goes_on}
        )
    return read


def _entity(served: Served, token: dict[str, Any]) -> dict[str, Any]:
    best = int(token["scores"].argmax())
    return {
        "entity": served.manifest.labels[best],
        "score": float(token["scores"][best]),
        "index": token["index"],
        "word": token["word"],
        "start": token["start"],
        "end": token["end"],
    }


def _words(read: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    words: list[list[dict[str, Any]]] = []
    for token in read:
        if token["goes_on"] and words:
            words[-1].append(token)
        else:
            words.append([token])
    return words


def _word(served: Served, word: list[dict[str, Any]], strategy: Aggregation) -> dict[str, Any]:
    """One label for all tokens of a word."""
    if strategy == "first":
        scores = word[0]["scores"]
    elif strategy == "max":
        scores = max(word, key=lambda token: float(token["scores"].max()))["scores"]
    else:
        scores = np.stack([token["scores"] for token in word]).mean(axis=0)
    best = int(scores.argmax())
    return {
        "entity": served.manifest.labels[best],
        "score": float(scores[best]),
        "word": served.tokens.join([token["word"] for token in word]),
        "start": word[0]["start"],
        "end": word[-1]["end"],
    }


def _groups(served: Served, entities: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbours with one tag, joined; a label "B-…" begins an entity of its own, "I-…" goes on one."""
    groups: list[list[dict[str, Any]]] = []
    for entity in entities:
        begins = entity["entity"].startswith("B-")
        if groups and not begins and _tag(groups[-1][-1]["entity"]) == _tag(entity["entity"]):
            groups[-1].append(entity)
        else:
            groups.append([entity])
    return [
        {
            "entity_group": group[0]["entity"].split("-", 1)[-1],
            "score": float(np.mean([entity["score"] for entity in group])),
            "word": served.tokens.join([entity["word"] for entity in group]),
            "start": group[0]["start"],
            "end": group[-1]["end"],
        }
        for group in groups
    ]


def _tag(label: str) -> str:
    return label[2:] if label.startswith(("B-", "I-")) else label


def _without_overlaps(entities: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of entities that two windows found at one place the longer one, of equally long ones the likelier."""
    kept: list[dict[str, Any]] = []
    for entity in sorted(entities, key=lambda e: int(e["start"])):
        if kept and kept[-1]["start"] <= entity["start"] < kept[-1]["end"]:
            if (entity["end"] - entity["start"], entity["score"]) > (
                kept[-1]["end"] - kept[-1]["start"],
                kept[-1]["score"],
            ):
                kept[-1] = entity
        else:
            kept.append(entity)
    return kept
