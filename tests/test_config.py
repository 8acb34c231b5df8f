"""The job file: strict about keys and types, replayable, and told apart by what matters."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ray_ensemble.config import JobConfig, dump_config, flatten, load_config
from ray_ensemble.errors import InputError

JOB = {"model": {"source": "owner/name"}, "tasks": ["data"]}


def write(folder: Path, **changes: object) -> Path:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump({**JOB, **changes}))
    return path


def test_resolved_config_reads_back_equal(tmp_path):
    path = write(tmp_path, training={"learning_rate": 2.0e-3}, gradients={"replicas": 3}, search={"groups": [2]})
    config = load_config(path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "elsewhere" / "config.yaml") == config


def test_relative_sources_start_at_the_job_file(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    path = write(
        tmp_path, model={"source": "model"}, tasks=["data", {"source": "hf:./saved"}, {"source": "pypi:a==1/b"}]
    )
    monkeypatch.chdir("/")
    config = load_config(path)
    assert config.model.source == str(tmp_path / "model")
    assert [t.source for t in config.tasks] == [str(tmp_path / "data"), f"hf:{tmp_path / 'saved'}", "pypi:a==1/b"]


def test_a_model_that_is_no_path_stays_a_hub_id(tmp_path):
    assert load_config(write(tmp_path)).model.source == "owner/name"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"serch": {}}, ["unknown key 'serch'", "did you mean 'search'?", "known keys: model, adapter, tasks"]),
        ({"search": {"grops": [2]}}, ["'search.grops'", "did you mean 'groups'?", "trials"]),
        ({"tasks": [{"source": "a", "promt": "x"}]}, ["'tasks.0.promt'", "did you mean 'prompt'?"]),
        ({"training": {"epochs": "two"}}, ["'training.epochs'", "integer", "'two'"]),
        ({"training": {"epochs": 0}}, ["'training.epochs'", "greater than or equal to 1"]),
        ({"gradients": {"replicas": "many"}}, ["'gradients.replicas'", "'auto'"]),
        ({"model": {}}, ["'model.source' is missing"]),
        ({"tasks": []}, ["'tasks'", "at least 1"]),
        ({"boosting": {"steps": -1}}, ["'boosting.steps'", "greater than or equal to 0", "-1"]),
        ({"boosting": {"method": "forest"}}, ["'boosting.method'", "'ridge' or 'train'"]),
        ({"boosting": {"regularization": 0.0}}, ["'boosting.regularization'"]),
        ({"boosting": {"regularisation": "auto"}}, ["unknown key 'boosting.regularisation'", "'regularization'"]),
        ({"boosting": {"train_steps": 0}}, ["'boosting.train_steps'", "greater than or equal to 1"]),
    ],
)
def test_wrong_keys_and_values_are_named(tmp_path, changes, words):
    with pytest.raises(InputError) as caught:
        load_config(write(tmp_path, **changes))
    message = str(caught.value)
    assert "\n" not in message
    for word in [str(tmp_path / "job.yaml"), *words]:
        assert word in message


def test_overrides_replace_values_and_are_checked(tmp_path):
    path = write(tmp_path)
    config = load_config(path, ["search.trials=5", "gradients.replicas=2", "search.groups=[3, 4]"])
    assert (config.search.trials, config.gradients.replicas, config.search.groups) == (5, 2, [3, 4])
    for wrong in ("search.trials", "search.trails=5", "model.source.deeper=1"):
        with pytest.raises(InputError):
            load_config(path, [wrong])


@pytest.mark.parametrize("text", ["- a list", "model: [unclosed", "\x00"])
def test_files_that_are_no_jobs_are_named(tmp_path, text):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"job\.yaml"):
        load_config(path)


def test_yaml_tags_do_not_make_objects(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("model: !!python/object/apply:os.system ['echo run']\ntasks: [a]\n")
    with pytest.raises(InputError, match="not a YAML file"):
        load_config(path)


def test_flatten_tells_every_leaf():
    config = JobConfig.model_validate(JOB)
    leaves = flatten(config)
    assert leaves["training.epochs"] == config.training.epochs
    assert leaves["tasks.0.source"] == "data"
    assert leaves["search.groups"] == [2, 3, 4, 5]


def test_steps_have_a_floor_and_round_up():
    training = JobConfig.model_validate({**JOB, "training": {"epochs": 3, "batch_size": 8, "min_steps": 10}}).training
    assert training.steps(8) == 10
    assert training.steps(33) == 13


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training: {epochs: 5}\ntraining: {batch_size: 4}\n", ["'training' is given twice", "line 5"]),
        ("training:\n  epochs: 5\n  epochs: 6\n", ["'epochs' is given twice"]),
        ("limits: {train: 2024-13-45}\n", ["not a YAML file", "month must be in"]),
        ("training: {gpus: .inf, workers: 2}\n", ["training.gpus", "finite"]),
        ("training: {learning_rate: .nan}\n", ["training.learning_rate"]),
    ],
)
def test_what_yaml_would_let_pass_is_named(tmp_path, text, words):
    path = tmp_path / "job.yaml"
    path.write_text("model: {source: owner/name}\ntasks: [data]\n# the rest\n" + text)
    with pytest.raises(InputError) as caught:
        load_config(path)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("source", ["~nosuchuser/x", "hf:~nosuchuser/x", "a\0b", "hf:https://u:p4ss@host/x"])
@pytest.mark.parametrize("place", ["model", "task"])
def test_sources_that_are_no_paths_are_refused(tmp_path, source, place):
    changes = {"model": {"source": source}} if place == "model" else {"tasks": [source]}
    with pytest.raises(InputError) as caught:
        load_config(write(tmp_path, **changes))
    assert "p4ss" not in str(caught.value)


def test_numbers_may_be_written_as_elsewhere(tmp_path):
    assert load_config(write(tmp_path), ["training.learning_rate=1e-3"]).training.learning_rate == 1e-3
    with pytest.raises(InputError, match="not YAML"):
        load_config(write(tmp_path), ["limits.train=2024-13-45"])


@pytest.mark.parametrize("word", ["1e3", "-2E5", "1.5", "yes", "2024-01-01", "null"])
def test_texts_that_look_like_something_else_read_back_as_texts(tmp_path, word):
    config = JobConfig.model_validate({**JOB, "tasks": [{"source": "data", "name": word, "labels": [word, "no"]}]})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    (task,) = load_config(tmp_path / "config.yaml").tasks
    assert (task.name, task.labels) == (word, [word, "no"])


def test_the_readmes_job_is_one():
    """Its data are elsewhere; its keys and values are checked, and the hub's unlabelled test split is not asked for."""
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (block,) = (each for each in text.split("```yaml\n")[1:] if "tasks:" in each)
    config = JobConfig.model_validate(yaml.safe_load(block.partition("```")[0]))
    (hub,) = (task for task in config.tasks if task.source.startswith("hf:"))
    assert hub.splits == {"train": "train", "validation": "validation"}
