"""The zoo as a table in docs/verification.md, and read back from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- zoo -->", "<!-- end of zoo -->"
HEAD = (
    "| cheater | what it does | caught by | in one audit | across classes, `fp32` | `bf16w` |"
    " audits to 99 %: own class, `fp32`, `bf16w` | windows: `fp32`, `bf16w` |"
)
AUDITS = ("audits_to_99", "audits_to_99_across_classes", "audits_to_99_across_classes_bf16w")
WINDOWS = ("windows_to_99_across_classes", "windows_to_99_across_classes_bf16w")

AUDITED = 0.05 / 3
"""The chance that a span of a session over three hops is audited by default."""


def to_99(detected: float) -> int | None:
    """Audits after which a cheater that each of them finds with this probability is found with 99 %; None for never."""
    if detected <= 0:
        return None
    return 1 if detected >= 0.99 else math.ceil(math.log(0.01) / math.log(1 - detected))


def sessions_to_99(detected: float, audited: float = AUDITED) -> int | None:
    """Sessions, where only so many of them are audited."""
    return to_99(detected * audited)


def row(name: str, one: Mapping[str, Any]) -> str:
    across = [one["detected_across_classes"], one["detected_across_classes_bf16w"]]
    cells = [name, one["what"], one["check"], f"{one['detected']:.2f}"]
    cells += ["-" if share is None else f"{share:.2f}" for share in across]
    cells += [", ".join("-" if one[count] is None else str(one[count]) for count in kind) for kind in (AUDITS, WINDOWS)]
    return "| " + " | ".join(cells) + " |"


def lines(cheaters: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [HEAD, "|---|---|---|---|---|---|---|---|", *(row(name, one) for name, one in cheaters.items())]


def put_table(page: Path, cheaters: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace what is between the markers."""
    text = page.read_text()
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    page.write_text(f"{head}{BEGIN}\n" + "\n".join(lines(cheaters)) + f"\n{END}{tail}")


def read_table(page: Path) -> dict[str, list[str]]:
    """{cheater: the other cells} as the page says."""
    inside = page.read_text().partition(BEGIN)[2].partition(END)[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in inside.splitlines() if "|" in line]
    return {cell[0]: cell[1:] for cell in cells[2:]}
