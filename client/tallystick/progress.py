"""A publication's progress on the terminal: stage, bytes, speed and the time that is left, on standard error."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

if TYPE_CHECKING:  # the client and its command line load without tallystick_model
    from tallystick_model.publishing.progress import Progress

_TITLES = {"pieces": "writing pieces", "canary": "running the canary"}


class ProgressBar:
    """One bar for each stage; as a context it clears the terminal's state when it ends."""

    def __init__(self, console: Console | None = None) -> None:
        self._bar = Bar(
            _text("{task.description}"),
            BarColumn(bar_width=10),
            DownloadColumn(binary_units=True, table_column=Column(no_wrap=True)),
            _text("{task.fields[speed]}"),
            _text("{task.fields[left]}"),
            _text("{task.fields[detail]}"),
            console=console or Console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bars as they are; what is printed from now on comes below them."""
        self._bar.stop()

    def show(self, progress: Progress) -> None:
        """Draw where a publication is. May be called from any thread."""
        if progress.stage == "note":
            self._bar.console.print(progress.detail, highlight=False, markup=False)
        if progress.stage not in _TITLES:
            return
        if progress.stage not in self._tasks:
            title = _TITLES[progress.stage]
            self._tasks[progress.stage] = self._bar.add_task(title, total=progress.total, speed="", left="", detail="")
        self._bar.update(
            self._tasks[progress.stage],
            completed=progress.done,
            total=progress.total,
            speed="" if progress.rate is None else f"{decimal(int(progress.rate))}/s",
            left="" if progress.eta_s is None else f"{told(progress.eta_s)} left",
            detail=progress.detail,
        )


def told(seconds: float) -> str:
    """A duration as people say it: 42 s, 3 min 10 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def _text(field: str) -> TextColumn:
    """A column of plain text: no markup, for a name may hold brackets."""
    return TextColumn(field, markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
