"""`hf:` sources through the real `datasets` package, saved to disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from ray_ensemble.config import TaskConfig
from ray_ensemble.errors import InputError
from ray_ensemble.tasks import SPLITS, Task, read_hub

FEATURES = datasets.Features(
    {
        "passage": datasets.Value("string"),
        "year": datasets.Value("int32"),
        "vector": datasets.List(datasets.Value("float32")),
        "label": datasets.ClassLabel(names=["n", "y"]),
    }
)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()


def rows(size: int, kind: str, labels: Sequence[int] = (0, 1)) -> datasets.Dataset:
    columns = {
        "passage": [f"{kind} {i} {{year}}" for i in range(size)],
        "year": list(range(size)),
        "vector": [[0.0]] * size,
        "label": [labels[i % len(labels)] for i in range(size)],
    }
    return datasets.Dataset.from_dict(columns, features=FEATURES)


def save(path: Path, **splits: datasets.Dataset) -> Path:
    datasets.DatasetDict(splits).save_to_disk(str(path))
    return path


def read(source: Path | str, base: Path = Path("/"), **config: Any) -> Task:
    settings = {"prompt": "{passage} ({year})", "labels": ["No", "Yes"], **config}
    return read_hub(TaskConfig(source=f"hf:{source}", **settings), base)


def test_scalar_columns_become_fields(tmp_path: Path) -> None:
    save(tmp_path / "boolq", train=rows(8, "a"), validation=rows(4, "b"), test=rows(6, "c"))
    task = read("boolq", tmp_path)
    assert task.name == "boolq"
    assert [len(task[split]) for split in SPLITS] == [8, 4, 6]
    assert task["validation"][3].fields == {"passage": "b 3 {year}", "year": "3"}
    assert task["validation"][3].label == 1
    assert read(tmp_path / "boolq") == task


def test_missing_splits_are_drawn_from_train_without_repeats(tmp_path: Path) -> None:
    doubled = datasets.concatenate_datasets([rows(100, "a"), rows(100, "a")])
    save(tmp_path / "d", train=doubled, dev=rows(10, "b"))
    task = read(tmp_path / "d", splits={"train": "train", "test": "dev"})
    assert {split: len(task[split]) for split in SPLITS} == {"train": 80, "validation": 20, "test": 10}
    assert not {e.fields["year"] for e in task["train"]} & {e.fields["year"] for e in task["validation"]}
    assert task["test"][0].fields["passage"] == "b 0 {year}"
    assert read(tmp_path / "d", splits={"train": "train", "test": "dev"}) == task
    assert read(tmp_path / "d", splits={"train": "train", "test": "dev"}, seed=1) != task
    assert {split: len(examples) for split, examples in read(tmp_path / "d").splits.items()} == {
        "train": 50,
        "validation": 20,
        "test": 30,
    }


def test_a_data_set_without_splits_is_train(tmp_path: Path) -> None:
    rows(50, "a").save_to_disk(str(tmp_path / "one"))
    assert [len(read(tmp_path / "one")[split]) for split in SPLITS] == [25, 10, 15]


def test_answers_map_strings_and_numbers(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"t": ["a", "b"], "y": ["entailed ", "not"]})
    save(tmp_path / "s", train=data, validation=data, test=data)
    task = read(tmp_path / "s", prompt="{t}", answers=["not", "entailed"], label_field="y")
    assert [example.label for example in task["train"]] == [1, 0]
    save(tmp_path / "i", train=rows(4, "a"), validation=rows(4, "b"), test=rows(4, "c"))
    assert [e.label for e in read(tmp_path / "i", answers=[1, 0])["train"]] == [1, 0, 1, 0], (
        "answers turn integers, too"
    )


def test_errors_name_what_there_is(tmp_path: Path) -> None:
    good = {"train": rows(8, "a"), "validation": rows(4, "b")}
    save(tmp_path / "d", **good, test=rows(4, "c", labels=[0, -1]))
    with pytest.raises(
        InputError, match=r"d test row 1: label -1, the mark of an unlabelled split; name labelled ones"
    ):
        read(tmp_path / "d")
    with pytest.raises(InputError, match=r"no split 'valid'; did you mean 'validation'\? \(known splits: train, val"):
        read(tmp_path / "d", splits={"train": "train", "validation": "valid"})
    with pytest.raises(InputError, match=r"no train split; name one in 'splits'"):
        read(tmp_path / "d", splits={"test": "validation"})
    with pytest.raises(InputError, match=r"train row 0: no field 'vector' for the prompt.*known fields: passage, year"):
        read(tmp_path / "d", prompt="{vector}")
    with pytest.raises(InputError, match=r"train row 0: no field 'y' for the label \(known fields: passage, year, lab"):
        read(tmp_path / "d", label_field="y")
    with pytest.raises(InputError, match="'prompt' is missing"):
        read(tmp_path / "d", prompt=None)


def test_data_sets_that_cannot_be_had_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing: no such folder"):
        read("./nothing", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"^hf:.*empty: the data set cannot be loaded \([^\n]*\)$"):
        read(tmp_path / "empty")
    with pytest.raises(InputError, match=r"^hf:a bad id!: the data set cannot be loaded \([^\n]*\)$"):
        read("a bad id!")
