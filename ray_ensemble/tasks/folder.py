"""Task folders: `train.jsonl`, `validation.jsonl`, `test.jsonl` of `{"text": str, "label": int}` and `task.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray_ensemble.config import TaskConfig
from ray_ensemble.errors import InputError
from ray_ensemble.files import read_json
from ray_ensemble.tasks.rows import Schema, read_jsonl
from ray_ensemble.tasks.task import SPLITS, Example, Task

_DESCRIPTION = "task.json"


def is_task_folder(path: Path) -> bool:
    """Whether `path` is a folder with a `task.json`."""
    return (path / _DESCRIPTION).is_file()


def find_task_folders(path: Path) -> list[Path]:
    """`path` itself if it is a task folder, else its sub-folders that are, sorted by name.

    Raises:
        InputError: there is none.
    """
    if is_task_folder(path):
        return [path]
    folders = sorted((entry for entry in path.iterdir() if is_task_folder(entry)), key=lambda entry: entry.name)
    if not folders:
        raise InputError(f"{path}: neither a task folder (no {_DESCRIPTION}) nor a folder of task folders")
    return folders


def read_folder(path: Path, config: TaskConfig) -> Task:
    """Read one task folder; `name`, `prompt`, `labels` of `config` come before those of `task.json`.

    Every string or number of a line but the label is a field that the prompt may name. A label is the index of its
    word, or a word (one of `config.answers`, if given).

    Raises:
        InputError: a file is missing or damaged, or a line does not fit the labels or the prompt; names file and line.
    """
    name, schema = _described(path, config)
    splits = {}
    for split in SPLITS:
        file = path / f"{split}.jsonl"
        splits[split] = tuple(schema.row_example(row, f"{file}:{line}") for line, row in read_jsonl(file))
    return Task(name, schema.prompt, schema.labels, splits)


def read_few(path: Path, config: TaskConfig) -> Task:
    """Read what there is of a task that nothing is trained on: `train.jsonl` and `validation.jsonl`, or one of them.

    Lines with a label become the train split of the result, those without one its test split (their labels mean nothing).
    `test.jsonl` is left alone.

    Raises:
        InputError: as for `read_folder`, or there is no line at all.
    """
    name, schema = _described(path, config)
    labelled: list[Example] = []
    bare: list[Example] = []
    files = [path / "train.jsonl", path / "validation.jsonl"]
    for file in files:
        for line, row in read_jsonl(file) if file.exists() else ():
            where = f"{file}:{line}"
            if row.get(schema.label_field) is None:
                bare.append(schema.example(schema.fields(row), 0, where))
            else:
                labelled.append(schema.row_example(row, where))
    if not labelled and not bare:
        raise InputError(f"{path}: no examples in {' or '.join(file.name for file in files)}")
    return Task(name, schema.prompt, schema.labels, {"train": tuple(labelled), "validation": (), "test": tuple(bare)})


def _described(path: Path, config: TaskConfig) -> tuple[str, Schema]:
    """A folder's name and what turns its lines into examples."""
    where = path / _DESCRIPTION
    description = read_json(where, "description of a task")
    if not isinstance(description, dict):
        raise InputError(f"{where}: expected an object with 'name', 'prompt' and 'labels'")
    prompt = config.prompt if config.prompt is not None else _text(description, "prompt", where)
    labels = config.labels if config.labels is not None else _words(description, where)
    name = config.name if config.name is not None else _text(description, "name", where) or path.name
    return name, Schema.make(prompt, labels, config, str(where))


def _text(description: dict[str, Any], key: str, where: Path) -> str | None:
    value = description.get(key)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{where}: '{key}' must be a string, got {value!r}")
    return value


def _words(description: dict[str, Any], where: Path) -> list[str] | None:
    value = description.get("labels")
    if value is not None and not (isinstance(value, list) and all(isinstance(word, str) for word in value)):
        raise InputError(f"{where}: 'labels' must be a list of strings, got {value!r}")
    return value
