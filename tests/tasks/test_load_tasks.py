"""A job's tasks: dispatch by source, limits, and the checks that stand before any model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from task_data import MakeWheel, write_jsonl, write_task

from ray_ensemble.config import LimitsConfig, TaskConfig
from ray_ensemble.errors import InputError
from ray_ensemble.tasks import SPLITS, Task, load_tasks


def load(base: Path, *sources: str | TaskConfig, **limits: Any) -> list[Task]:
    configs = [TaskConfig(source=source) if isinstance(source, str) else source for source in sources]
    return load_tasks(configs, LimitsConfig(**limits), base)


def test_every_kind_of_source_in_the_jobs_order(tmp_path: Path, make_wheel: MakeWheel) -> None:
    for name in ("suite/b", "suite/a", "single"):
        write_task(tmp_path / name)
    rows = "".join(f'{{"input": "question {i}", "ideal": "{"NY"[i % 2]}"}}\n' for i in range(20))
    pin = make_wheel({"sets/quiz/samples.jsonl": rows})
    quiz = TaskConfig(
        source=f"pypi:toysets==1.2/sets/quiz/samples.jsonl#sha256={pin}", prompt="{input}", labels=["N", "Y"]
    )
    tasks = load(tmp_path, "single", "suite", quiz)
    assert [task.name for task in tasks] == ["single", "a", "b", "quiz"]
    assert [len(tasks[3][split]) for split in SPLITS] == [10, 4, 6]


def test_limits_sample_each_split_in_its_order_even_if_sorted_by_label(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": int(i >= 200)} for i in range(400)]
    write_task(tmp_path / "sorted", train=rows, test=rows)
    (task,) = load(tmp_path, "sorted", train=40, validation=2, test=100)
    assert [len(task[split]) for split in SPLITS] == [40, 2, 100]
    places = [int(example.fields["text"][1:]) for example in task["test"]]
    assert places == sorted(places)
    assert 8 <= sum(example.label for example in task["train"]) <= 32
    assert load(tmp_path, "sorted", train=40, validation=2, test=100) == [task]


def test_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    write_task(tmp_path / "a/films")
    write_task(tmp_path / "b/Films")
    with pytest.raises(InputError, match=r"two tasks of one name: 'films' \(a/films\) and 'Films' \(b/Films\)"):
        load(tmp_path, "a/films", "b/Films")


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "-x", "a b", "x" * 65, "ä", "a\n"])
def test_names_that_cannot_be_folders_are_refused(tmp_path: Path, name: str) -> None:
    write_task(tmp_path / "films")
    with pytest.raises(InputError, match=r"films: the task name .* cannot name a folder"):
        load(tmp_path, TaskConfig(source="films", name=name))


def test_one_name_for_many_tasks_is_refused(tmp_path: Path) -> None:
    write_task(tmp_path / "suite/a")
    write_task(tmp_path / "suite/b")
    with pytest.raises(InputError, match=r"suite: one name, 'x', for a folder of 2 tasks"):
        load(tmp_path, TaskConfig(source="suite", name="x"))


ROW = {"text": "x", "label": 0}


@pytest.mark.parametrize(
    ("changes", "limits", "message"),
    [
        ({"train": []}, {}, "its train split is empty; at least 2 needed"),
        ({"train": [ROW]}, {}, "its train split has 1 example; at least 2 needed"),
        ({"validation": [ROW]}, {}, "its validation split has 1 example; at least 2 needed"),
        ({"test": []}, {}, "its test split is empty; at least 1 needed"),
        ({}, {"train": 1}, r"its train split has 1 example after limits\.train; at least 2 needed"),
    ],
)
def test_too_few_examples(tmp_path: Path, changes: dict[str, Any], limits: dict[str, int], message: str) -> None:
    write_task(tmp_path / "films", **changes)
    with pytest.raises(InputError, match=rf"task 'films' \(films\): {message}"):
        load(tmp_path, "films", **limits)


def test_unknown_kinds_of_data_are_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data.csv", [])
    with pytest.raises(InputError, match=r"data\.csv: not a known kind of data \(a task folder"):
        load(tmp_path, "data.csv")
    (tmp_path / "films").mkdir()
    with pytest.raises(InputError, match=r"film: no such file or folder; did you mean 'films'\?"):
        load(tmp_path, "film")


ORDERS = {
    "sorted": lambda i, count: int(i >= count // 2),
    "alternating": lambda i, count: i % 2,
    "sorted in part": lambda i, count: i % 2 if i >= count // 2 else 0,
}


@pytest.mark.parametrize("order", ORDERS)
def test_an_order_that_tells_labels_is_not_kept(tmp_path: Path, order: str) -> None:
    """The first of a split, and every other one, then have both labels; nothing is lost, and it is the same each time."""
    rows = [{"text": f"t{i}", "label": ORDERS[order](i, 80)} for i in range(80)]
    write_task(tmp_path / "told", train=rows, validation=rows)
    (task,) = load(tmp_path, "told")
    for split in ("train", "validation"):
        examples = task[split]
        assert sorted(e.fields["text"] for e in examples) == sorted(row["text"] for row in rows)
        ones = sum(row["label"] for row in rows) / 80
        for part in (examples[:40], examples[40:], examples[::2], examples[1::2]):
            assert abs(sum(e.label for e in part) / 40 - ones) < 0.25
    assert load(tmp_path, "told") == [task]


def test_an_order_of_chance_is_kept(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 2, 80).tolist()
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]
    write_task(tmp_path / "shuffled", train=rows, validation=rows)
    (task,) = load(tmp_path, "shuffled")
    for split in ("train", "validation"):
        assert [e.fields["text"] for e in task[split]] == [row["text"] for row in rows]
