"""Tokenizers and chat templates of strangers: answers as of the libraries, and an end to whatever goes too far."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import transformers

from harness import checkpoints
from tallystick.templates import render_chat
from tallystick_model.sandbox.tokenizers import examine_tokenizer
from tallystick_protocol.errors import ConfigError, ManifestError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who <keeps> the “stock”? "},
    {"role": "assistant", "content": "The lender.", "reasoning_content": "A tally has two halves."},
    {"role": "user", "content": "And the foil?"},
]
TOOLS = [{"type": "function", "function": {"name": "weigh", "parameters": {"type": "object", "properties": {}}}}]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

TEMPLATES = {
    "roles between marks": """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}""",
    "system folded into the first turn": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{% set system = messages[0]['content'] | trim + '\\n\\n' %}{% set messages = messages[1:] %}
{% else %}{% set system = '' %}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% set content = (system if loop.first else '') + message['content'] %}
{% if message['role'] == 'user' %}{{ '[INST] ' + content | trim + ' [/INST]' }}
{%- else %}{% generation %}{{ ' ' + content | trim + eos_token }}{% endgeneration %}{% endif %}{% endfor %}""",
    "tools, reasoning, loop controls": """{%- set ns = namespace(seen=0, found={}) %}
{%- if tools %}{{ tools | tojson }} {{ tools | tojson(indent=2) }}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- set ns.seen = ns.seen + 1 %}
    {%- if message.thinking is defined %}
<think>{{ message.thinking }}|{{ message.reasoning_content }}</think>
    {%- endif %}
    {%- if ns.seen > 2 %}{% break %}{% endif %}
{{ ns.seen }}: {{ message.content | upper }}{{ dict(a=1) | tojson }}
{%- endfor %}{% macro end(x) %}{{ x ~ '!' }}{% endmacro %}{{ end(strftime_now('%Y') | length) }}""",
}


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
def test_a_template_renders_as_in_transformers(tmp_path: Path, name: str, tools: Any) -> None:
    checkpoints.add_companions(tmp_path)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **SPECIAL)
    expected = tokenizer.apply_chat_template(
        CHAT, tools=tools, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True
    )
    assert render_chat(TEMPLATES[name], CHAT, SPECIAL, tools) == expected


HOSTILE = {
    "nested loops": ("{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3, "stopped"),
    "a long string": ("{{ 'a' * 10 ** 9 }}", "memory"),
    "doubling": (
        "{% set n = namespace(x='a') %}{% for i in range(64) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
        "memory",
    ),
    "padding": ("{{ '%999999999d' % 1 }}", "memory"),
    "much output": ("{{ 'a' * 10 ** 7 }}", "bytes came out"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "class of a string": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "globals of a function": ("{{ strftime_now.__globals__['json'] }}", "unsafe"),
    "globals of a class": ("{{ cycler.__init__.__globals__ }}", "unsafe"),
    "format string": ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe"),
    "changing its input": ("{{ messages.append(1) }}", "unsafe"),
    "private names": ("{{ namespace(_x=1) }}", "underscore"),
    "files": ("{% include '/etc/passwd' %}", "no loader"),
    "its own refusal": ("{{ raise_exception('no system role') }}", "no system role"),
    "no template": ("{% if %}", "TemplateSyntaxError"),
}


@pytest.mark.parametrize("what", sorted(HOSTILE))
def test_a_hostile_template_ends_soon_with_its_reason(what: str) -> None:
    template, message = HOSTILE[what]
    begun = time.monotonic()
    with pytest.raises(ManifestError, match=message):
        render_chat(template, CHAT)
    assert time.monotonic() - begun < 6


def test_messages_are_plain_values() -> None:
    with pytest.raises(ConfigError, match="plain JSON"):
        render_chat("x", [{"role": "user", "content": object()}])


def tokenizer_file(path: Path, **changes: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    checkpoints.add_companions(path.parent)
    content = json.loads((path.parent / "tokenizer.json").read_text())
    path.write_text(json.dumps(content | changes))
    return path


def test_a_tokenizer_is_examined(tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path / "tokenizer.json")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    found = examine_tokenizer(path, checkpoints.TEXT)
    assert (found.highest, found.size) == (max(tokenizer.get_vocab().values()), len(tokenizer))
    assert list(found.ids) == tokenizer.encode(checkpoints.TEXT, add_special_tokens=False)


def test_hostile_tokenizers_are_refused(tmp_path: Path) -> None:
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    backtracking = {**split, "pattern": {"Regex": "(a|aa|a?a?)+$"}}
    cycle = [{"id": 0, "content": "", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True}]  # fmt: skip
    hostile = {
        "no model": {"model": None},
        "merges of unknown tokens": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]}},
        "a broken pattern": {"pre_tokenizer": {**split, "pattern": {"Regex": "("}}},
        "ids beyond 32 bits": {"model": {"type": "WordLevel", "vocab": {"a": 1 << 40}, "unk_token": "a"}},
        "nested": {"normalizer": json.loads('{"type":"Sequence","normalizers":[' * 200 + "]}" * 200)},
    }
    for what, changes in hostile.items():
        with pytest.raises(ManifestError, match=r"tokenizer\.json"):
            examine_tokenizer(tokenizer_file(tmp_path / "t" / f"{what}.json", **changes))
    for what, changes in {"backtracking": {"pre_tokenizer": backtracking}, "empty": {"added_tokens": cycle}}.items():
        begun = time.monotonic()
        try:  # either it copes within its limits, or it is told why not
            examine_tokenizer(tokenizer_file(tmp_path / "t" / f"{what}.json", **changes))
        except ManifestError as error:
            assert "tokenizer.json" in error.message
        assert time.monotonic() - begun < 30
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(500 << 20)
    with pytest.raises(ManifestError, match="limit"):
        examine_tokenizer(huge)
