"""The census as a table in docs/models.md, and read back from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- census -->", "<!-- end of census -->"


def special_cases() -> list[str]:
    """Rules keyed on a model's name, with their reasons. There are none."""
    return []


def row(result: dict[str, Any]) -> str:
    why = result["why"] or ("" if result["crop"] else "no crop: recurrent state")
    execution = "canonical" if result["canonical"] else "stock" if result["result"] in ("bitwise", "close") else ""
    calls = "shared" if result["packs"] else "own" if execution else ""
    return f"| {result['type']} | {result['task']} | {result['result']} | {execution} | {calls} | {_clean(why)} |"


def _clean(text: str) -> str:
    return text.replace("|", "/").replace("<", "‹").replace(">", "›")


def put_table(page: Path, results: Sequence[dict[str, Any]], counts: dict[str, Any]) -> None:
    """Replace what is between the markers."""
    text = page.read_text()
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    lines = [
        f"{counts['types']} model types ({counts['pairs']} with their tasks), {counts['built']} built: "
        f"{counts['bitwise']} bitwise, {counts['close']} close, {len(counts['refused'])} refused, "
        f"{len(counts['wrong'])} wrong; {counts['canonical']} canonical, {counts['packs']} in shared calls; "
        f"{counts['published']} published from a saved checkpoint and served.",
        "",
        "| type | task | result | execution | calls | note |",
        "|---|---|---|---|---|---|",
        *(row(result) for result in sorted(results, key=lambda one: (one["type"], one["task"]))),
    ]
    page.write_text(f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{tail}")


def read_table(page: Path) -> dict[tuple[str, str], tuple[str, str, str]]:
    """{(type, task): (result, execution, calls)} as the page says."""
    inside = page.read_text().partition(BEGIN)[2].partition(END)[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in inside.splitlines() if "|" in line]
    return {(cell[0], cell[1]): (cell[2], cell[3], cell[4]) for cell in cells[2:]}
