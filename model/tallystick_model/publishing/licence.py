"""Under which licence a checkpoint comes, as its own files say it."""

from __future__ import annotations

import re
from pathlib import Path

from tallystick_model.publishing.checkpoint import TensorSource
from tallystick_protocol.errors import ManifestError

MAX_LICENCE = 200
_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md")
_MARKS = (("Apache License", "Apache-2.0"), ("MIT License", "MIT"), ("BSD 3-Clause", "BSD-3-Clause"))
_READ_BYTES = 20_000


def find_licence(source: TensorSource) -> str:
    """The licence as the README's front matter, a LICENSE file or the config says it, in one printable line.

    Raises ManifestError when nothing does.
    """
    front = re.match(r"---\s*\n(.*?)\n---", _beginning(source.folder / "README.md"), re.DOTALL)
    if front and (said := _named(front[1], "license")):
        return (_named(front[1], "license_name") or said) if said == "other" else said
    for name in _FILES:
        if text := _beginning(source.folder / name):
            identifier = next((identifier for mark, identifier in _MARKS if mark in text), "")
            if said := identifier or next(filter(None, map(_one_line, text.splitlines())), ""):
                return said
    in_config = source.config.get("license")
    if isinstance(in_config, str) and (said := _one_line(in_config)):
        return said
    raise ManifestError("no licence found in README.md or LICENSE: say it with --licence")


def _named(front: str, field: str) -> str:
    """A field of YAML front matter that is one word, or the first of a list; else nothing."""
    said = re.search(rf"^{field}:(?:[ \t]*|[ \t]*\n[ \t]*-[ \t]+)[\"']?(\w[\w.+-]*)", front, re.MULTILINE)
    return said[1][:MAX_LICENCE] if said else ""


def _beginning(path: Path) -> str:
    """The first bytes of a text, without a byte order mark; nothing when there is no such file."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return file.read(_READ_BYTES).decode("utf-8-sig", errors="replace")


def _one_line(text: str) -> str:
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())[:MAX_LICENCE]
