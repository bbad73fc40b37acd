"""A calibration, told: as a table for people, as plain values, and as a plot (SVG, written by hand)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

from tallystick_model.calibrating.judging import Judged
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.sketching.accumulating import protocol_level
from tallystick_protocol.sketching.thresholds import thresholds

HEAD = (
    "layers", "windows", "exact", "median", "worst", "stock", "rare", "usual", "quiet", "weakest cheater", "times",
    "found in",
)  # fmt: skip
"""windows, exact, median, worst: of honest nodes; times: the weakest cheater's median over the honest worst; found in:
windows after which 99 of 100 of every kind of cheater are found by slow evidence."""

WIDTH, HEIGHT = 960, 520
LEFT, RIGHT, TOP, BOTTOM = 80, 190, 40, 60
FLOOR = 1e-8
"""Where windows without any error are drawn."""

COLOURS = ("#d62728", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#17becf", "#bcbd22")


def weakest(one: Judged) -> str:
    """The cheater whose median error is the smallest."""
    return min(one.cheaters, key=lambda name: one.cheaters[name].median)


def rows(judged: Sequence[Judged]) -> list[tuple[str, ...]]:
    """The cells of a table under HEAD."""
    found = []
    for one in judged:
        name = weakest(one)
        shown = one.cheaters[name]
        slowest = [cheat.windows for cheat in one.cheaters.values()]
        needed = "more" if None in slowest else str(max(count for count in slowest if count is not None))
        numbers = (one.median, one.worst, one.stock, one.level.rare, one.level.usual, one.level.quiet)
        found.append((
            str(one.span), str(one.windows), f"{one.exact:.0%}", *(f"{number:.1e}" for number in numbers),
            f"{name} {shown.median:.1e}", f"{shown.median / max(one.worst, FLOOR):.1f}", needed,
        ))  # fmt: skip
    return found


def values(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """The same, and all else that was measured, as JSON takes it."""
    return [
        {
            "layers": [one.span.start, one.span.end],
            "windows": one.windows,
            "honest": {"exact": one.exact, "median": one.median, "worst": one.worst, "stock_worst": one.stock},
            "rare": one.level.rare,
            "usual": one.level.usual,
            "quiet": one.level.quiet,
            "held_out": list(one.held_out),
            "cheaters": {
                name: {"lowest": shown.lowest, "median": shown.median, "windows_to_99": shown.windows}
                for name, shown in one.cheaters.items()
            },
        }
        for one in judged
    ]


def plot(manifest: Manifest, judged: Sequence[Judged]) -> str:
    """Errors over spans, on a logarithmic axis: honest ones from median to worst, levels, cheaters from lowest to
    median, and the protocol's thresholds."""
    errors = [shown.median for one in judged for shown in one.cheaters.values()]
    bottom = math.floor(math.log10(min(max(min(one.median for one in judged), FLOOR), FLOOR * 10)))
    top = math.ceil(math.log10(max([*errors, *(one.level.rare for one in judged), 1e-2]))) + 0.2
    step = (WIDTH - LEFT - RIGHT) / len(judged)

    def x(index: int, part: float = 0.5) -> float:
        return LEFT + (index + part) * step

    def y(error: float) -> float:
        share = (math.log10(max(error, 10.0**bottom)) - bottom) / (top - bottom)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    drawn = [_text(WIDTH / 2, 22, f"{manifest.name}, {manifest.numerics}: windows of nodes of other classes", "middle")]
    for power in range(bottom, math.floor(top) + 1):
        drawn.append(_line(LEFT, y(10.0**power), WIDTH - RIGHT, y(10.0**power), "#dddddd"))
        drawn.append(_text(LEFT - 8, y(10.0**power) + 4, f"1e{power}", "end"))
    names = list(dict.fromkeys(name for one in judged for name in one.cheaters))
    for index, one in enumerate(judged):
        drawn += _column(manifest, one, names, lambda part, index=index: x(index, part), y)  # type: ignore[misc]
        drawn.append(_text(x(index), HEIGHT - BOTTOM + 18, str(one.span), "middle"))
    drawn.append(_line(LEFT, TOP, LEFT, HEIGHT - BOTTOM, "black"))
    drawn.append(_line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "black"))
    drawn.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 16, "layers of the span", "middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    label = "error of a window, relative to what the span adds"
    drawn.append(f'<g transform="rotate(-90 18 {middle:.1f})">{_text(18, middle, label, "middle")}</g>')
    drawn += _legend(names)
    body = "\n".join(drawn)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
        f' font-family="sans-serif" font-size="12">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n{body}\n</svg>\n'
    )


def _column(manifest: Manifest, one: Judged, names: Sequence[str], x: Any, y: Any) -> list[str]:
    """What is drawn of one span."""
    wide = x(0.3) - x(0.1)
    tall = max(y(one.median) - y(one.worst), 1.0)
    drawn = [f'<rect x="{x(0.1):.1f}" y="{y(one.worst):.1f}" width="{wide:.1f}" height="{tall:.1f}" fill="#2ca02c"/>']
    for error, colour in ((one.level.rare, "#1f77b4"), (one.level.usual, "#6baed6"), (one.level.quiet, "#c6dbef")):
        drawn.append(_line(x(0.05), y(error), x(0.95), y(error), colour, 2))
    limits = thresholds(manifest, one.span)
    marks = [(protocol_level(manifest, one.span), "4 3")]
    if manifest.output_of(one.span) == "hidden":
        marks += [(limits.clear, "2 3"), (limits.guilty, "8 3")]
    for error, dashes in marks:
        drawn.append(_line(x(0.05), y(error), x(0.95), y(error), "#444444", 1, dashes))
    for name, shown in one.cheaters.items():
        at, colour = x(0.4 + 0.5 * names.index(name) / max(len(names) - 1, 1)), _colour(names.index(name))
        drawn.append(_line(at, y(shown.lowest), at, y(shown.median), colour, 3))
        drawn.append(f'<circle cx="{at:.1f}" cy="{y(shown.median):.1f}" r="4" fill="{colour}"/>')
    return drawn


def _legend(names: Sequence[str]) -> list[str]:
    told = [
        ("honest, median to worst", "#2ca02c", ""), ("rare level", "#1f77b4", ""), ("usual level", "#6baed6", ""),
        ("quiet level", "#c6dbef", ""), ("protocol: clear", "#444444", "2 3"), ("protocol: level", "#444444", "4 3"),
        ("protocol: guilty", "#444444", "8 3"),
        *((name, _colour(number), "") for number, name in enumerate(names)),
    ]  # fmt: skip
    drawn = []
    for number, (name, colour, dashes) in enumerate(told):
        at = TOP + 18 * number
        drawn.append(_line(WIDTH - RIGHT + 14, at, WIDTH - RIGHT + 40, at, colour, 3 if not dashes else 1, dashes))
        drawn.append(_text(WIDTH - RIGHT + 46, at + 4, name, "start"))
    return drawn


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, wide: int = 1, dashes: str = "") -> str:
    broken = f' stroke-dasharray="{dashes}"' if dashes else ""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{wide}"{broken}/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
