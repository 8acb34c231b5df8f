"""The evals converter and the splits that it draws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from task_data import write_jsonl

from ray_ensemble.config import TaskConfig
from ray_ensemble.errors import InputError
from ray_ensemble.tasks import SPLITS, Task, convert_samples, read_samples
from ray_ensemble.tasks.split import draw_splits, drop_repeats, sample
from ray_ensemble.tasks.task import Example


def chat(text: str, ideal: object, system: str = "Say Yes or No.") -> dict[str, Any]:
    return {
        "input": [{"role": "system", "content": system}, {"role": "user", "content": text}],
        "ideal": ideal,
    }


def convert(rows: Sequence[dict[str, Any]], **config: Any) -> Task:
    settings = {"source": "s", "prompt": "{text}\nAnswer:", "labels": ["No", "Yes"], **config}
    return convert_samples(enumerate(rows, 1), TaskConfig(**settings), "t", "s.jsonl")


def everything(task: Task) -> list[Example]:
    return [example for split in SPLITS for example in task[split]]


def test_messages_become_fields() -> None:
    roles = ["system", "user", "assistant", "system", "user"]
    row = {"input": [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)], "ideal": ["Yes", "yes"]}
    (example,) = everything(convert([row]))
    assert example.fields == {"input": "user 4", "text": "user 4", "system": "system 0\nsystem 3"}
    assert example.label == 1
    (example,) = everything(convert([{"input": "plain", "ideal": "No"}], prompt="{input}"))
    assert example.fields == {"input": "plain", "text": "plain", "system": ""}
    assert example.label == 0


def test_rows_without_a_user_can_be_prompted_by_the_system_message() -> None:
    row = {"input": [{"role": "system", "content": "is it?"}], "ideal": "Yes"}
    assert everything(convert([row], prompt="{system}"))[0].fields == {"system": "is it?"}
    with pytest.raises(InputError, match=r"s\.jsonl:1: no field 'text' for the prompt \(known fields: system\)"):
        convert([row])


@pytest.mark.parametrize("ideal", ["1", " 1\n", 1, ["1"], [1, 0]])
def test_answers_are_compared_as_stripped_text(ideal: object) -> None:
    assert everything(convert([chat("a", ideal)], answers=[0, 1]))[0].label == 1


def test_integer_ideals_are_never_indices() -> None:
    with pytest.raises(InputError, match=r"s\.jsonl:1: answer '1' \(known answers: 'No', 'Yes'\)"):
        convert([chat("a", 1)])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (chat("b", "Maybe"), r"answer 'Maybe' \(known answers: 'No', 'Yes'\)"),
        (chat("b", []), "'ideal' is an empty list"),
        ({"input": [{"role": "user", "content": ["b"]}], "ideal": "No"}, "'input' must be a string or a list"),
        ({"input": "b"}, r"expected 'input' and 'ideal', or a label under 'label' \(keys: input\)"),
        ({"text": "b", "label": 2}, "label 2 is out of range 0 to 1"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write_jsonl(tmp_path / "samples.jsonl", [chat("a", "No"), row])
    with pytest.raises(InputError, match=rf"samples\.jsonl:2: .*{message}"):
        read_samples(path, TaskConfig(source="s", prompt="{text}", labels=["No", "Yes"]))


def test_plain_lines_take_indices_and_answers(tmp_path: Path) -> None:
    rows = [{"q": "a", "label": 1}, {"q": "b", "label": "No"}]
    labels = {example.fields["q"]: example.label for example in everything(convert(rows, prompt="{q}"))}
    assert labels == {"a": 1, "b": 0}


def test_names_come_from_the_path(tmp_path: Path) -> None:
    config = TaskConfig(source="s", prompt="{text}", labels=["No", "Yes"])
    rows = [chat("a", "No")]
    assert read_samples(write_jsonl(tmp_path / "sarcasm/samples.jsonl", rows), config).name == "sarcasm"
    path = write_jsonl(tmp_path / "sarcasm/easy.jsonl", rows)
    assert read_samples(path, config).name == "easy"
    assert read_samples(path, config.model_copy(update={"name": "mine"})).name == "mine"


def test_repeats_are_dropped_and_contradictions_too() -> None:
    rows = [
        chat("One  Thing", "Yes", system="a"),
        chat(" one\nthing", "Yes", system="b"),
        chat("another", "Yes"),
        chat("Another ", "No"),
        chat("another", "Yes"),
        chat("third", "No"),
    ]
    assert sorted(example.fields["text"] for example in everything(convert(rows))) == ["One  Thing", "third"]
    texts = Counter(example.fields["text"] for example in everything(convert(rows, prompt="{system} {text}")))
    assert set(texts) == {"One  Thing", " one\nthing", "third"}, "all fields of the prompt count"


def test_the_seed_decides_the_splits() -> None:
    rows = [chat(f"text {i}", "Yes" if i % 3 == 0 else "No") for i in range(200)]
    first, again, other = convert(rows), convert(rows), convert(rows, seed=1)
    assert first == again
    assert first["train"] != other["train"]
    assert [len(first[split]) for split in SPLITS] == [100, 40, 60]


def test_parts_are_disjoint_in_texts_and_make_up_the_whole() -> None:
    rows = [chat(f"text {i // 2}", "Yes" if (i // 2) % 3 == 0 else "No") for i in range(400)]
    parts = [{e.fields["text"] for e in everything(convert(rows, part=f"{i}/3"))} for i in (1, 2, 3)]
    assert sum(map(len, parts)) == 200
    assert set.union(*parts) == {f"text {i}" for i in range(200)}
    with pytest.raises(InputError, match="part 4/3"):
        convert(rows, part="4/3")


label_lists = st.lists(st.integers(0, 4), max_size=300)


@given(label_lists, st.integers(0, 5))
def test_drawn_splits_are_a_partition_with_the_labels_shares(labels: list[int], seed: int) -> None:
    examples = [Example({"text": str(i)}, label) for i, label in enumerate(labels)]
    splits = draw_splits(examples, seed, ("validation", "test"))
    drawn = [example.fields["text"] for split in splits.values() for example in split]
    assert sorted(drawn) == sorted(example.fields["text"] for example in examples)
    assert (len(splits["validation"]), len(splits["test"])) == (len(labels) // 5, len(labels) * 3 // 10)
    for label, count in Counter(labels).items():
        for split in splits.values():
            share = len(split) / len(labels)
            found = sum(example.label == label for example in split)
            # Each stretch of the spread order is right to within one per label at both of its ends.
            assert abs(found - share * count) <= 1 + len(set(labels))


def test_shares_hold_closely_for_usual_sizes() -> None:
    examples = [Example({"text": str(i)}, int(i < 900)) for i in range(1000)]
    splits = draw_splits(examples, 0, ("validation", "test"))
    assert {split: sum(e.label for e in found) for split, found in splits.items()} == {
        "train": 450,
        "validation": 180,
        "test": 270,
    }
    order = [int(example.fields["text"]) for example in splits["train"]]
    assert order != sorted(order), "a file sorted by label is shuffled"


def test_caps() -> None:
    examples = [Example({"text": str(i)}, i % 2) for i in range(10_000)]
    splits = draw_splits(examples, 0, ("validation", "test"), train_cap=2000)
    assert {split: len(found) for split, found in splits.items()} == {"train": 2000, "validation": 500, "test": 1000}
    assert {split: len(found) for split, found in draw_splits(examples, 0, ("test",)).items()} == {
        "train": 9000,
        "test": 1000,
    }
    assert Counter(e.label for e in splits["train"]) == {0: 1000, 1: 1000}


def test_drop_repeats_keeps_first_places() -> None:
    examples = [Example({"t": text}, 0) for text in ("b", "a", "B", "c", "A")]
    assert [example.fields["t"] for example in drop_repeats(examples, ["t"])] == ["b", "a", "c"]


@given(st.integers(0, 40), st.integers(1, 50), st.integers(1, 50))
def test_samples_are_ordered_and_nested(total: int, small: int, large: int) -> None:
    examples = [Example({"t": str(i)}, 0) for i in range(total)]
    small, large = sorted((small, large))
    places = [[int(e.fields["t"]) for e in sample(examples, size)] for size in (small, large)]
    assert [len(found) for found in places] == [min(small, total), min(large, total)]
    assert all(found == sorted(found) for found in places)
    assert set(places[0]) <= set(places[1])
    assert sample(examples, None) == tuple(examples)
