"""The table in docs/models.md is true: 33 types of every kind are examined again, and the whole census at night."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from census.configs import Entry, entries
from census.exam import QUICK, examine
from census.run import summary, take_census
from census.table import read_table

PAGE = Path(__file__).parents[2] / "docs" / "models.md"

REPRESENTATIVES = """
    llama:causal qwen2:causal qwen3:causal qwen3_moe:causal mistral:causal mixtral:causal gemma2:causal phi3:causal
    gemma3:causal gemma3_text:causal gpt2:causal gpt_neox:causal gpt_oss:causal openai-gpt:causal
    bloom:causal falcon:causal mllama:causal modernvbert:masked
    mpt:causal opt:causal mamba:causal jamba:causal rwkv:causal
    longcat_flash:causal inkling2_text:causal musicgen:causal
    albert:masked bert:masked roberta:masked deberta-v2:masked bart:seq2seq marian:seq2seq voxtral:seq2seq
"""
"""Of every kind; tests/unit/test_model_towers.py and test_model_publish.py publish whole checkpoints."""


def entry(name: str) -> Entry:
    return next(one for one in entries() if one.name == name)


@pytest.mark.parametrize("name", REPRESENTATIVES.split())
def test_the_table_says_what_a_type_does(name: str) -> None:
    torch.set_num_threads(1)
    found = examine(entry(name), QUICK, publishing=False)
    execution = "canonical" if found["canonical"] else "stock" if found["result"] in ("bitwise", "close") else ""
    calls = "shared" if found["packs"] else "own" if execution else ""
    said = read_table(PAGE)[found["type"], found["task"]]
    assert (found["result"], execution, calls) == said, found["why"] or found["canonical_why"]


def test_the_table_lists_every_type() -> None:
    assert read_table(PAGE).keys() == {(one.type, one.task) for one in entries()}


@pytest.mark.nightly
def test_the_whole_census() -> None:
    results = take_census(entries(), jobs=2)
    counts: dict[str, Any] = summary(results)
    assert counts["bitwise"] >= 205
    assert not counts["wrong"]
    assert counts["published"] >= counts["bitwise"]
    table = read_table(PAGE)
    for found in results:
        assert table[found["type"], found["task"]][0] == found["result"], found
