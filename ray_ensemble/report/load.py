"""Reads what a run folder holds into one value that the HTML page, the plots and the terminal summary share."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_ensemble.config import JobConfig, load_config
from ray_ensemble.errors import InputError
from ray_ensemble.files import read_json, read_mapping

Data = dict[str, Any]

VARIANTS = {
    "base": "base model",
    "qlora_all": "one QLoRA on all",
    "group": "own group's adapter",
    "ensemble": "ensemble",
    "ensemble_unboosted": "ensemble without boosting",
    "uniform": "uniform weights",
    "routed": "ensemble, dataset not known",
    "merged": "ensemble merged",
}
RIVALS = ("base", "qlora_all", "ensemble")


@dataclass(frozen=True)
class Trial:
    """One trial of the search: how many groups it asked for, by which method, and the objective it reached."""

    m: int
    method: str
    objective: float


@dataclass(frozen=True)
class Curve:
    """The training log of one adapter, a point an optimiser step."""

    name: str
    steps: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class SearchData:
    """What the search left: `partition.json`, and its trials, empty where they were not kept (then `notes` say why)."""

    partition: Data
    trials: tuple[Trial, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class RunData:
    """A finished run. Tasks are in the order of their groups; `affinity` (n, n) and its errors follow that order. `adapters` are
    the groups'.

    What the folder may lack is empty or None here, and `notes[topic]` says in words what was not there or not
    readable.
    """

    folder: Path
    config: JobConfig
    config_text: str
    plan: Data
    groups: tuple[tuple[str, ...], ...]
    adapters: tuple[str, ...]
    tasks: Mapping[str, Data]
    affinity: NDArray[np.float64]
    affinity_errors: NDArray[np.float64] | None
    affinity_info: Data
    partition: Data
    ensemble: Data
    metrics: Data
    trials: tuple[Trial, ...]
    curves: tuple[Curve, ...]
    validation: Data | None
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def order(self) -> tuple[str, ...]:
        """Task names, group after group."""
        return tuple(task for group in self.groups for task in group)

    def group_of(self, task: str) -> int:
        """Index of the task's group."""
        return next(index for index, group in enumerate(self.groups) if task in group)

    def group_name(self, index: int) -> str:
        """The name of a group's adapter."""
        return self.adapters[index] if index < len(self.adapters) else f"group-{index}"

    def measured(self, task: str | None, variant: str) -> Data:
        """The test metric of a variant on a task (on their mean for None); empty where it was not measured."""
        found = self.metrics["mean"] if task is None else self.metrics["tasks"][task]
        value = found.get(variant)
        return value if isinstance(value, dict) else {}

    def variants(self) -> list[str]:
        """The variants of `VARIANTS` that were measured on at least one task, in that order."""
        return [name for name in VARIANTS if any(self.measured(task, name) for task in self.order)]


def load_search(folder: Path) -> SearchData:
    """Read what a search wrote, before or after the rest of the run.

    Raises:
        InputError: `partition.json` is missing or damaged.
    """
    notes: dict[str, list[str]] = {}
    partition = read_mapping(folder / "partition.json", "partition", "groups", list)
    return SearchData(partition, _trials(folder, notes), tuple(notes["search"]))


def load_run(folder: Path) -> RunData:
    """Read a run folder.

    Raises:
        InputError: a file that every finished run has is missing or damaged (named), or files name different tasks.
    """
    notes: dict[str, list[str]] = {}
    config = load_config(folder / "config.yaml")
    partition = read_mapping(folder / "partition.json", "partition", "groups", list)
    metrics = read_mapping(folder / "metrics.json", "table of metrics", "tasks", dict)
    if not isinstance(metrics.get("mean"), dict):
        raise InputError(f"{folder / 'metrics.json'}: there is no 'mean' in this table of metrics")
    listed = read_mapping(folder / "tasks.json", "list of tasks", "tasks", list)["tasks"]
    ensemble = read_mapping(folder / "ensemble.json", "ensemble", "adapters", list)
    groups = tuple(tuple(str(task) for task in group) for group in partition["groups"])
    order = [task for group in groups for task in group]
    if not order:
        raise InputError(f"{folder / 'partition.json'}: this partition has no groups")
    tasks = {str(task.get("name")): task for task in listed if isinstance(task, dict)}
    _same_tasks(folder / "tasks.json", tasks, order)
    _same_tasks(folder / "metrics.json", metrics["tasks"], order)
    affinity, errors, info = _affinity(folder / "affinity.json", order)
    adapters = tuple(str(name) for name in ensemble["adapters"] if name != "start")
    return RunData(
        folder=folder,
        config=config,
        config_text=(folder / "config.yaml").read_text(encoding="utf-8"),
        plan=_optional(folder / "plan.json", "plan", notes) or {},
        groups=groups,
        adapters=adapters,
        tasks={task: tasks[task] for task in order},
        affinity=affinity,
        affinity_errors=errors,
        affinity_info=info,
        partition=partition,
        ensemble=ensemble,
        metrics=metrics,
        trials=_trials(folder, notes),
        curves=_curves(folder, [*adapters], notes),
        validation=_optional(folder / "validation.json", "validation", notes),
        notes={topic: tuple(lines) for topic, lines in notes.items()},
    )


def _same_tasks(path: Path, found: Mapping[str, Any], order: list[str]) -> None:
    missing = [task for task in order if not isinstance(found.get(task), dict)]
    extra = [task for task in found if task not in set(order)]
    if missing or extra:
        problem = f"lacks task '{missing[0]}'" if missing else f"has task '{extra[0]}', unknown to"
        raise InputError(f"{path}: {problem} {'of ' if missing else ''}partition.json: these are of different runs")


def _optional(path: Path, topic: str, notes: dict[str, list[str]]) -> Data | None:
    if not path.is_file():
        return None
    data = read_json(path)
    if isinstance(data, dict):
        return data
    notes.setdefault(topic, []).append(f"{path.name} is not a JSON object and was left out.")
    return None


def _affinity(path: Path, order: list[str]) -> tuple[NDArray[np.float64], NDArray[np.float64] | None, Data]:
    data = read_mapping(path, "affinity", "values", list)
    names = [str(name) for name in data.get("tasks", [])]
    _same_tasks(path, {name: {} for name in names}, order)
    index = [names.index(task) for task in order]

    def matrix(key: str) -> NDArray[np.float64]:
        # null stands for a value that is not known.
        try:
            values = np.array([[math.nan if x is None else float(x) for x in row] for row in data[key]])
        except (TypeError, ValueError):
            raise InputError(f"{path}: '{key}' is not a matrix of numbers") from None
        if values.shape != (len(names), len(names)):
            raise InputError(f"{path}: '{key}' has shape {values.shape} for {len(names)} tasks")
        return values[np.ix_(index, index)]

    errors = matrix("standard_errors") if data.get("standard_errors") is not None else None
    info = {key: value for key, value in data.items() if key not in ("tasks", "values", "standard_errors", "members")}
    return matrix("values"), errors, info


def _trials(folder: Path, notes: dict[str, list[str]]) -> tuple[Trial, ...]:
    path = folder / "search" / "trials.csv"
    said = notes.setdefault("search", [])
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    except FileNotFoundError:
        said.append("This run folder has no search/trials.csv.")
        return ()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        said.append(f"search/trials.csv could not be read ({error}).")
        return ()
    trials = []
    for row in rows:
        try:
            trial = Trial(int(float(row["m"])), str(row.get("method") or "?"), float(row["objective"]))
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
        if math.isfinite(trial.objective):
            trials.append(trial)
    if len(trials) < len(rows):
        said.append(f"{len(rows) - len(trials)} of {len(rows)} rows of search/trials.csv have no objective.")
    return tuple(sorted(trials, key=lambda trial: (trial.m, trial.method, trial.objective)))


def _curves(folder: Path, adapters: list[str], notes: dict[str, list[str]]) -> tuple[Curve, ...]:
    paths = {name: folder / "adapters" / name / "train.jsonl" for name in adapters}
    paths["one QLoRA on all"] = folder / "baselines" / "qlora_all" / "train.jsonl"
    curves = []
    said = notes.setdefault("training", [])
    for name, path in paths.items():
        where = path.relative_to(folder)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            said.append(f"{where} is missing or cannot be read, so that adapter has no curve.")
            continue
        points: dict[int, float] = {}
        damaged = 0
        for line in lines:
            try:
                row = json.loads(line)
                step, loss = int(row["step"]), float(row["loss"])
            except (KeyError, TypeError, ValueError):
                damaged += 1
                continue
            # A step that was repeated after a restart counts as it went the last time.
            points[step] = loss
        if damaged:
            said.append(f"{damaged} of {len(lines)} lines of {where} could not be read.")
        finite = sorted((step, loss) for step, loss in points.items() if math.isfinite(loss))
        if finite:
            curves.append(Curve(name, tuple(step for step, _ in finite), tuple(loss for _, loss in finite)))
        elif not damaged:
            said.append(f"{where} is empty.")
    return tuple(curves)
