"""What is asked of a run's ensembles, checked before a model sees it. A row names a dataset and holds its prompt's fields."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_ensemble.ensemble.prediction import PredictedTask, Request
from ray_ensemble.errors import InputError, nearest
from ray_ensemble.files import read_json
from ray_ensemble.storage import run_files, run_place
from ray_ensemble.tasks import prompt_fields

_FORM = '{"task": "…", "<field>": "…"}'


class Refused(Exception):
    """A request that gets no answer: the HTTP status and the reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def tasks_of(folder: str | Path) -> dict[str, PredictedTask]:
    """The datasets of a run that has come to its ensemble, from its files alone.

    Raises:
        InputError: no run is there, or it is not that far.
    """
    run = run_files(run_place(folder), "ensemble")
    described = read_json(run / "tasks.json", "list of tasks")["tasks"]
    return {
        task["name"]: PredictedTask(task["prompt"], prompt_fields(task["prompt"]), tuple(task["labels"]))
        for task in described
    }


def check_row(row: Any, tasks: Mapping[str, PredictedTask], task: str | None = None) -> Request:
    """A row as (dataset, the fields that its prompt names); other keys of the row are left out.

    Args:
        row: parsed JSON: an object with the prompt's fields, and the dataset under `task` unless it is given.
        tasks: the datasets that may be named.
        task: the dataset of the row; a `task` in it is then like any other field.

    Raises:
        InputError: what is wrong with the row; it does not say which row it was.
    """
    if not isinstance(row, dict):
        raise InputError(f"expected an object such as {_FORM}, got {_short(row)}")
    name = row.get("task") if task is None else task
    if not isinstance(name, str):
        if name is None:
            raise InputError(f"no 'task', the dataset to answer for (tasks: {', '.join(tasks)})")
        raise InputError(f"'task' is the name of a dataset, not {_short(name)}")
    if name not in tasks:
        raise InputError(f"no task {_short(name)}{nearest(name, tasks)} (tasks: {', '.join(tasks)})")
    fields = tasks[name].fields
    if task is None and "task" in fields:
        raise InputError(
            f"the prompt of '{name}' names a field 'task', which here names the dataset; use predict --task {name}"
        )
    for field in fields:
        if field not in row:
            raise InputError(f"no field '{field}' (the prompt of '{name}' names {', '.join(fields)})")
        value = row[field]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise InputError(f"field '{field}' is neither text nor a number, but {_short(value)}")
        try:
            str(value).encode()
        except UnicodeError:
            raise InputError(f"field '{field}' holds half of a surrogate pair, which is no text") from None
    return name, {field: row[field] for field in fields}


def check_rows(
    rows: Iterable[tuple[int, dict[str, Any]]], where: str, tasks: Mapping[str, PredictedTask], task: str | None = None
) -> list[tuple[int, Request]]:
    """`check_row` of the (line, row) of a file.

    Raises:
        InputError: a row is wrong; it is told by `where` and its line.
    """
    found = []
    for line, row in rows:
        try:
            found.append((line, check_row(row, tasks, task)))
        except InputError as error:
            raise InputError(f"{where}:{line}: {error}") from None
    return found


def parse_body(body: bytes, tasks: Mapping[str, PredictedTask], max_rows: int) -> tuple[list[Request], bool]:
    """The body of a request to predict: an object, or a list of them.

    Returns:
        The rows, and whether they came as a list.

    Raises:
        Refused: 400 where the body is no JSON, 413 where there are more than `max_rows` rows, 422 where a row is wrong;
            a list's is told by its place, from 1.
    """
    try:
        data = json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError:
        raise Refused(400, "the body is not UTF-8 text") from None
    except RecursionError:
        raise Refused(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise Refused(400, f"the body is not JSON ({error})") from None
    if not isinstance(data, list):
        return [_row(data, tasks, "")], False
    if len(data) > max_rows:
        raise Refused(413, f"{len(data)} rows in one request; at most {max_rows} are taken")
    return [_row(row, tasks, f"row {number}: ") for number, row in enumerate(data, start=1)], True


def answers(ask: Callable[[Sequence[Request]], list[Any]], requests: Sequence[Request]) -> list[Any]:
    """The answer to each request, or an `InputError` in its place: what is wrong with one is nothing to the others."""
    try:
        return ask(requests)
    except InputError as error:
        if len(requests) == 1:
            return [InputError(str(error).removeprefix("request 1: "))]
        return [answers(ask, [request])[0] for request in requests]


def _row(row: Any, tasks: Mapping[str, PredictedTask], where: str) -> Request:
    try:
        return check_row(row, tasks)
    except InputError as error:
        raise Refused(422, f"{where}{error}") from None


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def _short(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=True)
    except RecursionError:
        return "what is nested too deeply"
    return text if len(text) <= 60 else text[:59] + "…"
