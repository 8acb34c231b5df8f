"""Progress on long work: a live bar on a terminal, a line now and then elsewhere, both on standard error; and figures for
Prometheus, where Ray runs (`metrics`)."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ray_ensemble.metrics import current_figures

_LINE_EVERY = 10.0  # seconds between lines where there is no terminal
console = Console(stderr=True, highlight=False)


class Bar:
    """Progress of one piece of work, in its own units.

    Args:
        title: what is being done.
        total: units in all.
        unit: their name, for the rate.
        done: units that an earlier run left behind; they do not count towards the rate.
    """

    def __init__(self, title: str, total: int, unit: str, done: int = 0) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._done, self._first = done, done
        self._note = ""
        self._figures = current_figures()
        self._started = self._spoken = time.monotonic()
        self._live: Progress | None = None
        self._id: TaskID | None = None

    def __enter__(self) -> Bar:
        self._started = self._spoken = time.monotonic()
        if sys.stderr.isatty():
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
            )
            self._live.start()
            self._id = self._live.add_task(self._title, total=self._total, completed=self._done, rate="")
        else:
            self._say()
        self._figure()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        elif kind is None:
            self._say()
        self._figure(under_way=False)

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count `units` more as done; `note` stands beside the rate."""
        self._done += units
        self._note = note
        self._figure()
        if self._live is not None and self._id is not None:
            self._live.update(self._id, completed=self._done, rate=f"{self._rate():.1f} {self._unit}/s {note}")
        elif time.monotonic() - self._spoken > _LINE_EVERY and self._done < self._total:
            self._say()

    def reach(self, done: int, total: int) -> None:
        """Say that `done` of `total` units are done; for work that learns its total on the way."""
        self._total = total
        if self._live is not None and self._id is not None:
            self._live.update(self._id, total=total)
        self.advance(done - self._done)

    def _rate(self) -> float:
        return (self._done - self._first) / max(time.monotonic() - self._started, 1e-9)

    def _figure(self, under_way: bool = True) -> None:
        rate = self._rate() if under_way else 0.0
        left = (self._total - self._done) / rate if rate else None
        self._figures.progress(
            self._unit, done=self._done, total=self._total, per_second=rate, seconds_left=left if under_way else 0.0
        )

    def _say(self) -> None:
        self._spoken = time.monotonic()
        text = f"{self._title}: {self._done}/{self._total} {self._unit}"
        rate = self._rate()
        if self._done > self._first:
            text += f", {rate:.1f}/s"
            if self._done < self._total:
                text += f", {(self._total - self._done) / rate:.0f} s left"
        if self._note:
            text += f" ({self._note})"
        console.print(text, markup=False, soft_wrap=True)
