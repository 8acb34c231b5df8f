"""Figures of a run for Prometheus: Ray exports them at the metrics port of the driver's node, as `ray_ensemble_…`.

They are told where progress is told, by the driver alone, so that nothing counts twice. A figure costs a few microseconds; where
Ray does not run, or refuses one, the run goes on without. Labels have few values: a run's name, its stages, units of work.
Ray's agent drops a gauge that two of its reports in a row did not have, so a run tells its gauges again and again until it ends.

    with run_figures("first") as figures:
        figures.stage("gradients", RUNNING)
        current_figures().progress("examples", done=3, total=40, per_second=1.5, seconds_left=24.7)
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

WAITING, RUNNING, WHOLE, FAILED = 0, 1, 2, 3  # values of `ensemble_stage`
TOLD_AGAIN_S = 5.0  # Ray reports every ten seconds unless told otherwise (`metrics_report_interval_ms`)


@dataclass(frozen=True)
class Figure:
    """One metric: its kind, what it tells, its labels, and the upper bounds of a histogram's buckets."""

    kind: Literal["gauge", "counter", "histogram"]
    description: str
    labels: tuple[str, ...] = ("run", "stage")
    bounds: tuple[float, ...] = ()


FIGURES: dict[str, Figure] = {
    "ensemble_stage": Figure("gauge", "A stage of a run: 0 waits, 1 is under way, 2 is whole, 3 failed."),
    "ensemble_stage_seconds": Figure("gauge", "Seconds that a whole stage took."),
    "ensemble_done": Figure("gauge", "Units of work that are done, of the work under way.", ("run", "stage", "unit")),
    "ensemble_total": Figure("gauge", "Units of work in all, of the work under way.", ("run", "stage", "unit")),
    "ensemble_per_second": Figure("gauge", "Units of work a second since this work began.", ("run", "stage", "unit")),
    "ensemble_seconds_left": Figure("gauge", "Seconds left of the work under way.", ("run", "stage", "unit")),
    "ensemble_unit_seconds": Figure(
        "histogram",
        "Seconds from handing a unit to an actor to taking its result.",
        bounds=(0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0),
    ),
    "ensemble_adapters_trained": Figure("counter", "Adapters trained to their end."),
    "ensemble_adapters_failed": Figure("counter", "Adapters that could not be trained."),
    "ensemble_training_interruptions": Figure(
        "counter",
        "Training jobs that lost a worker: to memory, to a pre-empted node, or by a failure.",
        ("run", "stage", "reason"),
    ),
    "ensemble_memory_halvings": Figure("counter", "Times that batches were halved because memory ran out."),
    "ensemble_actors_lost": Figure("counter", "Actors that died while their nodes stayed."),
    "ensemble_preemptions": Figure("counter", "Actors whose nodes went away."),
}


class Figures:
    """The figures of one run. Until Ray is up gauges are kept, and told when it is.

    Args:
        run: the run's name, the value of the label `run`.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._stage = ""
        self._kept: dict[tuple[str, tuple[str, ...]], float] = {}
        self._connected = self._off = False
        self._lock = threading.Lock()

    def stage(self, name: str, state: int, seconds: float | None = None) -> None:
        """Say how a stage stands (`WAITING` … `FAILED`), and how long it took if it is whole; later figures are of the stage
        that is under way."""
        if state == RUNNING:
            self._stage = name
        self._tell("ensemble_stage", state, stage=name)
        if seconds is not None:
            self._tell("ensemble_stage_seconds", seconds, stage=name)

    def progress(self, unit: str, *, done: int, total: int, per_second: float, seconds_left: float | None) -> None:
        """Say how far the work under way is, in its own unit. Time left that cannot be told is not."""
        self._tell("ensemble_done", done, unit=unit)
        self._tell("ensemble_total", total, unit=unit)
        self._tell("ensemble_per_second", per_second, unit=unit)
        if seconds_left is not None:
            self._tell("ensemble_seconds_left", seconds_left, unit=unit)

    def count(self, name: str, amount: int = 1, **labels: str) -> None:
        """Add to a counter."""
        if amount > 0:
            self._tell(name, amount, **labels)

    def observe(self, name: str, value: float) -> None:
        """Add a value to a histogram."""
        self._tell(name, value)

    def tell_gauges_again(self) -> None:
        """Say all gauges as they were last, lest they be taken for a dead process's."""
        with self._quietly():
            if not self._off and _ray_is_up():
                self._record_kept()

    def _tell(self, name: str, value: float, **labels: str) -> None:
        figure = FIGURES[name]
        known = {"run": self._run, "stage": self._stage, **labels}
        values = tuple(known[label] for label in figure.labels)
        with self._quietly():
            if figure.kind == "gauge":
                self._kept[name, values] = value
            if self._off or not _ray_is_up():
                return
            if not self._connected:
                self._connected = True
                self._record_kept()
            _record(name, dict(zip(figure.labels, values, strict=True)), value)

    def _record_kept(self) -> None:
        for (name, values), value in self._kept.items():
            _record(name, dict(zip(FIGURES[name].labels, values, strict=True)), value)

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """One thread at a time. Whatever Ray has against it is said once: a run does not fail by being watched."""
        with self._lock:
            try:
                yield
            except Exception as error:
                self._off = True
                print(f"no more figures for Prometheus: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


class _NoFigures(Figures):
    """What is told outside a run goes nowhere."""

    def _tell(self, name: str, value: float, **labels: str) -> None:
        return


_NOWHERE = _NoFigures("")
_current: ContextVar[Figures] = ContextVar("figures", default=_NOWHERE)
_made: dict[str, Any] = {}  # Ray's objects, by name; one serves all sessions of a process


@contextmanager
def run_figures(run: str) -> Iterator[Figures]:
    """The figures of a run, current until the block ends. Threads that the block starts have to be handed theirs."""
    figures = Figures(run)
    ended = threading.Event()

    def tell_again() -> None:
        while not ended.wait(TOLD_AGAIN_S):
            figures.tell_gauges_again()

    teller = threading.Thread(target=tell_again, name="figures", daemon=True)
    token = _current.set(figures)
    teller.start()
    try:
        yield figures
    finally:
        _current.reset(token)
        ended.set()
        teller.join()


def current_figures() -> Figures:
    """The figures of the run under way; outside of one, some that go nowhere."""
    return _current.get()


def exported_names() -> set[str]:
    """The names that Prometheus sees: Ray puts `ray_` before all, `_total` after counters, and cuts a histogram in three."""
    names = set()
    for name, figure in FIGURES.items():
        ends = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}[figure.kind]
        names |= {f"ray_{name}{end}" for end in ends}
    return names


def _ray_is_up() -> bool:
    """Whether this process is connected; Ray is not imported to find out."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _record(name: str, labels: Mapping[str, str], value: float) -> None:
    from ray.util import metrics

    figure = FIGURES[name]
    made = _made.get(name)
    if figure.kind == "gauge":
        made = made or metrics.Gauge(name, figure.description, figure.labels)
        made.set(value, dict(labels))
    elif figure.kind == "counter":
        made = made or metrics.Counter(name, figure.description, figure.labels)
        made.inc(value, dict(labels))
    else:
        made = made or metrics.Histogram(name, figure.description, list(figure.bounds), figure.labels)
        made.observe(value, dict(labels))
    _made[name] = made
