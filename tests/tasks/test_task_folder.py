"""The folder format: what is read, what the job file overrides, and errors that name file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from task_data import write_jsonl, write_task

from ray_ensemble.config import TaskConfig
from ray_ensemble.errors import InputError
from ray_ensemble.tasks import find_task_folders, read_few, read_folder


def read(folder: Path, **config: Any) -> Any:
    return read_folder(folder, TaskConfig(source=str(folder), **config))


def test_folder_is_read_as_it_stands(tmp_path: Path) -> None:
    rows = [
        {"text": "line\u2028inside", "year": 1999, "score": 0.5, "tags": ["x"], "none": None, "label": 1},
        {"text": "b", "label": 0},
    ]
    task = read(write_task(tmp_path / "films", train=rows))
    assert (task.name, task.labels, task.prompt) == ("films", ("negative", "positive"), "Review: {text}\nSentiment:")
    assert task["train"][0].fields == {"text": "line\u2028inside", "year": "1999", "score": "0.5"}
    assert [example.label for example in task["train"]] == [1, 0]
    assert [len(task[split]) for split in ("train", "validation", "test")] == [2, 6, 4]


def test_the_job_file_comes_before_task_json(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "films", name=None)
    assert read(folder).name == "films", "the folder's name where task.json has none"
    task = read(folder, name="mine", prompt="Q: {text}", labels=["bad", "good"])
    assert (task.name, task.prompt, task.labels) == ("mine", "Q: {text}", ("bad", "good"))


def test_labels_may_be_words_or_answers(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": " positive"}, {"text": "b", "label": "negative"}]
    folder = write_task(tmp_path / "words", train=rows, validation=rows, test=rows)
    assert [example.label for example in read(folder)["train"]] == [1, 0]
    rows = [{"text": "a", "y": 4}, {"text": "b", "y": 0}]
    folder = write_task(tmp_path / "answers", train=rows, validation=rows, test=rows)
    task = read(folder, answers=[0, "4"], label_field="y")
    assert [example.label for example in task["train"]] == [1, 0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x", "label": 2}, r"train\.jsonl:3: label 2 is out of range 0 to 1 \(labels: negative, positive\)"),
        ({"text": "x", "label": -1}, r"train\.jsonl:3: label -1, the mark of an unlabelled split"),
        ({"text": "x", "label": "positiv"}, r"train\.jsonl:3: answer 'positiv'; did you mean 'positive'\?"),
        ({"text": "x", "label": None}, r"train\.jsonl:3: answer 'None' \(known answers: 'negative', 'positive'\)"),
        ({"text": "x", "label": True}, r"train\.jsonl:3: answer 'True' \(known answers: 'negative', 'positive'\)"),
        ({"text": "x"}, r"train\.jsonl:3: no field 'label' for the label \(known fields: text\)"),
        ({"txt": "x", "n": 1, "label": 0}, r"train\.jsonl:3: no field 'text'.*mean 'txt'\? \(known fields: txt, n\)"),
        ({"text": None, "label": 0}, r"train\.jsonl:3: no field 'text' for the prompt \(known fields: none\)"),
        (["x", 1], r"train\.jsonl:3: expected a JSON object, got \['x', 1\]"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, row: object, message: str) -> None:
    good = {"text": "x", "label": 0}
    folder = write_task(tmp_path / "films", train=[good, good, row])
    with pytest.raises(InputError, match=message):
        read(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', r"test\.jsonl:3: not a JSON object"),
        (b'{"text": "\xff", "label": 0}', r"test\.jsonl:3: not UTF-8"),
        (b'{"text": "\\ud800", "label": 0}', r"test\.jsonl:3: not UTF-8"),
        (b'{"text": "x", "label": 0, "n": 1' + b"0" * 5000 + b"}", r"test\.jsonl:3: not a JSON object"),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    folder = write_task(tmp_path / "films")
    (folder / "test.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "\\ud83d\\ude00", "label": 0}\n\n' + line + b"\n")
    with pytest.raises(InputError, match=message):
        read(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "'labels' is missing"),
        ({"labels": ["one"]}, r"at least two labels, got \['one'\]"),
        ({"labels": ["a", "b", "a"]}, "label 'a' stands twice"),
        ({"labels": ["a", " "]}, "label ' ' is blank"),
        ({"labels": ["a", " b"]}, "label ' b' is blank or has blanks around it"),
        ({"labels": [0, 1]}, "'labels' must be a list of strings"),
        ({"prompt": None}, "'prompt' is missing"),
        ({"prompt": "no field"}, "names no field"),
        ({"name": 3}, "'name' must be a string"),
    ],
)
def test_bad_descriptions_name_the_file(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = write_task(tmp_path / "films", **changes)
    with pytest.raises(InputError, match=rf"films/task\.json: .*{message}"):
        read(folder)


def test_answers_must_fit_the_labels(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "films")
    with pytest.raises(InputError, match="3 answers for 2 labels"):
        read(folder, answers=[0, 1, 2])
    with pytest.raises(InputError, match="answer '1' stands twice"):
        read(folder, answers=[1, "1 "])


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "films")
    (folder / "test.jsonl").unlink()
    with pytest.raises(InputError, match=r"films/test\.jsonl: cannot read the file \(No such file"):
        read(folder)
    (folder / "task.json").write_text("{")
    with pytest.raises(InputError, match=r"films/task\.json: this description of a task cannot be read"):
        read(folder)


def test_folders_of_tasks_are_found_by_name(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write_task(tmp_path / "suite" / name)
    write_jsonl(tmp_path / "suite/notes/train.jsonl", [])
    assert [folder.name for folder in find_task_folders(tmp_path / "suite")] == ["a", "b", "c"]
    assert find_task_folders(tmp_path / "suite/b") == [tmp_path / "suite/b"]
    with pytest.raises(
        InputError, match=r"notes: neither a task folder \(no task\.json\) nor a folder of task folders"
    ):
        find_task_folders(tmp_path / "suite/notes")


def test_a_few_examples_may_lack_labels_and_files(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "a", "label": 1}, {"text": "b"}, {"text": "c", "label": None}]
    folder = write_task(tmp_path / "books", train=rows, validation=[{"text": "d", "label": "negative"}])
    config = TaskConfig(source=str(folder))
    task = read_few(folder, config)
    assert [(example.fields["text"], example.label) for example in task["train"]] == [("a", 1), ("d", 0)]
    assert [example.fields["text"] for example in task["test"]] == ["b", "c"], "the test file is left alone"
    (folder / "validation.jsonl").unlink()
    (folder / "test.jsonl").unlink()
    assert [example.label for example in read_few(folder, config)["train"]] == [1]
    write_jsonl(folder / "train.jsonl", [{"label": 1}])
    with pytest.raises(InputError, match=r"train\.jsonl:1: no field 'text'"):
        read_few(folder, config)
    (folder / "train.jsonl").unlink()
    with pytest.raises(InputError, match=r"no examples in train\.jsonl or validation\.jsonl"):
        read_few(folder, config)
