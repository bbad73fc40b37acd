"""Rendering a chat template: the inner side runs in the worker, `render_chat` is for callers.

The environment is what templates of the model hubs are written for (transformers' `apply_chat_template`): Jinja's
immutable sandbox, blocks trimmed, loop controls, `tojson` that does not escape HTML, `raise_exception`,
`strftime_now`, `namespace`, and `{% generation %}` blocks that render their body.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from tallystick_model.sandbox.limited import Limits, ask
from tallystick_protocol.errors import ConfigError

MAX_TEMPLATE = 1 << 20
LIMITS = Limits(cpu_s=2, wall_s=5.0, memory_bytes=384 << 20, output_bytes=8 << 20)
_REASONING = ("reasoning_content", "thinking", "reasoning")


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, str] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """The text of a conversation, in a process of its own with 2 s of processor time and 384 MiB.

    messages: [{"role": …, "content": …}, …] of plain JSON values. special_tokens: {"bos_token": "<s>", …}. tools: JSON
    schemas. Raises ManifestError when the template is wrong, refuses the messages or goes over a limit; ConfigError for
    messages that are not plain values.
    """
    request = {
        "template": template,
        "messages": list(messages),
        "special_tokens": dict(special_tokens or {}),
        "tools": None if tools is None else list(tools),
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        json.dumps(request)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"chat messages are objects of plain JSON values: {str(error)[:100]}") from None
    return str(ask("chat template", request, LIMITS))


def check_template(template: str) -> None:
    """Raises ManifestError for a template that is no Jinja, or that goes over a limit when it is compiled."""
    ask("chat template", {"template": template, "only_compile": True}, LIMITS)


def render(request: dict[str, Any]) -> str:
    """The inner side. Raises whatever Jinja and the template raise."""
    template = request["template"]
    if len(template) > MAX_TEMPLATE:
        raise ValueError(f"the template has {len(template)} characters, {MAX_TEMPLATE} is the limit")
    found = _environment().from_string(template)
    if request.get("only_compile"):
        return ""
    rendered: str = found.render(
        messages=[_with_reasoning(message) for message in request["messages"]],
        tools=request["tools"],
        documents=None,
        add_generation_prompt=request["add_generation_prompt"],
        **request["special_tokens"],
    )
    return rendered


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning goes by several names: templates read `reasoning_content` or `thinking`."""
    said = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    return message if said is None else {"thinking": said, **message, "reasoning_content": said}


def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - Jinja's own interface

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def refuse_private(names: Any) -> None:
        if any(str(name).startswith("_") for name in names):
            raise SecurityError("names that begin with an underscore are not for templates")

    class PublicNamespace(Namespace):
        def __init__(*args: Any, **kwargs: Any) -> None:
            self, *rest = args
            values = dict(*rest, **kwargs)
            refuse_private(values)
            Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            refuse_private([name])
            Namespace.__setitem__(self, name, value)

    def make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda layout: datetime.now().strftime(layout),
        "dict": make_dict,
        "namespace": PublicNamespace,
    }
    return environment
