"""The tasks of a job: every source read, checked and cut to the job's limits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ray_ensemble.config import LimitsConfig, TaskConfig
from ray_ensemble.errors import InputError
from ray_ensemble.tasks.evals import read_samples
from ray_ensemble.tasks.folder import find_task_folders, read_folder
from ray_ensemble.tasks.hub import read_hub
from ray_ensemble.tasks.sources import resolve_source
from ray_ensemble.tasks.split import sample, without_order
from ray_ensemble.tasks.task import SPLITS, Split, Task

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LEAST: dict[Split, int] = {"train": 2, "validation": 2, "test": 1}


def load_tasks(tasks: Sequence[TaskConfig], limits: LimitsConfig, base_dir: Path) -> list[Task]:
    """Read the tasks in their order; a folder of task folders gives several, sorted by folder name.

    Where a split has more examples than its limit, a random sample with seed 0 is taken, in the split's own order (a
    file may be sorted by label); a smaller limit keeps part of what a larger one keeps. Training and validation splits that are
    sorted by label, or alternate between labels, are then shuffled (`without_order`).

    Args:
        tasks: the job's `tasks`.
        limits: the job's `limits`; `max_tokens` is for `encode_task`.
        base_dir: the folder that relative sources start at.

    Raises:
        InputError: a source cannot be read or does not fit its labels or prompt, a name is taken or cannot be a folder
            name, or a split has too few examples.
    """
    loaded: list[Task] = []
    taken: dict[str, str] = {}
    for config in tasks:
        for task in _read(config, base_dir):
            check_name(task.name, config.source)
            # Names become folder names, and some file systems do not tell cases apart.
            key = task.name.casefold()
            this = f"'{task.name}' ({config.source})"
            if key in taken:
                raise InputError(f"two tasks of one name: {taken[key]} and {this}; set 'name' to tell them apart")
            taken[key] = this
            loaded.append(_limited(task, limits, config.source))
    return loaded


def check_name(name: str, where: str) -> None:
    """Raise `InputError` for a task's name that cannot be a folder's; `where` begins the message."""
    if not _NAME.fullmatch(name):
        allowed = "letters, digits, '.', '_' and '-', at most 64, a letter or digit first"
        raise InputError(f"{where}: the task name {name!r} cannot name a folder ({allowed})")


def _read(config: TaskConfig, base_dir: Path) -> list[Task]:
    hub = config.source.startswith("hf:")
    path = None if hub else resolve_source(config.source, base_dir)
    if config.part is not None and (path is None or path.is_dir()):
        raise InputError(f"{config.source}: 'part' is for a single .jsonl file without splits of its own")
    if path is None:
        return [read_hub(config, base_dir)]
    if path.is_dir():
        folders = find_task_folders(path)
        if config.name is not None and len(folders) > 1:
            raise InputError(f"{path}: one name, '{config.name}', for a folder of {len(folders)} tasks")
        return [read_folder(folder, config) for folder in folders]
    if path.suffix != ".jsonl":
        raise InputError(f"{path}: not a known kind of data (a task folder, a folder of them, a .jsonl file, hf:<id>)")
    return [read_samples(path, config)]


def _limited(task: Task, limits: LimitsConfig, source: str) -> Task:
    sizes: dict[Split, int | None] = {"train": limits.train, "validation": limits.validation, "test": limits.test}
    splits = {split: sample(task[split], sizes[split]) for split in SPLITS}
    for split, least in _LEAST.items():
        found = len(splits[split])
        if found < least:
            what = "is empty" if found == 0 else f"has {found} example"
            cut = f" after limits.{split}" if len(task[split]) >= least else ""
            raise InputError(f"task '{task.name}' ({source}): its {split} split {what}{cut}; at least {least} needed")
    splits |= {split: without_order(splits[split]) for split in ("train", "validation")}
    return Task(task.name, task.prompt, task.labels, splits)
