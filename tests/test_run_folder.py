"""A run folder belongs to one job and one owner, and knows when a stage is whole."""

from __future__ import annotations

import pytest
import yaml

from ray_ensemble.config import JobConfig
from ray_ensemble.errors import InputError
from ray_ensemble.run_folder import STAGES, RunFolder


def job(**changes) -> JobConfig:
    return JobConfig.model_validate({"model": {"source": "a/b"}, "tasks": ["/data"], **changes})


def finish_all(folder: RunFolder) -> None:
    for stage in STAGES:
        file = folder / f"{stage}.out"
        file.write_text(stage)
        folder.finish(stage, [file], {})


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"model": {"source": "a/c"}}, "plan"),
        ({"adapter": {"rank": 8}}, "plan"),
        ({"limits": {"max_tokens": 99}}, "tasks"),
        ({"tasks": ["/data", "/more"]}, "tasks"),
        ({"gradients": {"seed": 1}}, "gradients"),
        ({"gradients": {"dim": 100}}, "gradients"),
        ({"estimator": {"subsets": 9}}, "search"),
        ({"search": {"price": 0.1}}, "search"),
        ({"search": {"rule": "one_standard_error"}}, "search"),
        ({"training": {"min_steps": 3}}, "search"),
        ({"training": {"sampling": "tasks"}}, "search"),
        ({"training": {"learning_rate": 0.1}}, "train"),
        ({"training": {"early_stop": {"every": 5}}}, "train"),
        ({"ensemble": {"weights": "uniform"}}, "ensemble"),
    ],
)
def test_another_job_is_refused_and_redo_runs_exactly_what_depends_on_it(tmp_path, changes, first):
    finish_all(RunFolder(tmp_path / "run", job()))
    with pytest.raises(InputError, match="another config") as caught:
        RunFolder(tmp_path / "run", job(**changes))
    section = next(iter(changes))
    assert section in str(caught.value)
    assert "->" in str(caught.value)
    again = RunFolder(tmp_path / "run", job(**changes), redo=True)
    place = STAGES.index(first)
    assert [again.whole(stage) for stage in STAGES] == [True] * place + [False] * (len(STAGES) - place)
    RunFolder(tmp_path / "run", job(**changes))  # the folder now belongs to the new job


def test_keys_that_only_change_speed_are_free(tmp_path):
    folder = RunFolder(tmp_path / "run", job())
    finish_all(folder)
    again = RunFolder(tmp_path / "run", job(gradients={"replicas": 7}, training={"concurrency": 1, "cpus": 2.0}))
    assert all(again.whole(stage) for stage in STAGES)
    # What a run that ran out of memory is told to change.
    again = RunFolder(tmp_path / "run", job(training={"batch_tokens": 99, "activation_checkpointing": True}))
    assert all(again.whole(stage) for stage in STAGES)


def test_a_folder_from_before_a_key_existed_is_the_job_that_leaves_the_key_at_its_default(tmp_path):
    folder = RunFolder(tmp_path / "run", job())
    finish_all(folder)
    file = folder / "config.yaml"
    older = yaml.safe_load(file.read_text())
    for key in ("sampling", "early_stop", "optimizer", "precision", "batch_tokens", "activation_checkpointing"):
        del older["training"][key]
    file.write_text(yaml.safe_dump(older))
    again = RunFolder(tmp_path / "run", job())
    assert all(again.whole(stage) for stage in STAGES)
    with pytest.raises(InputError, match=r'training\.sampling: "examples" -> "tasks"'):
        RunFolder(tmp_path / "run", job(training={"sampling": "tasks"}))


@pytest.mark.parametrize("harm", ["missing", "changed"])
def test_damage_is_named_and_only_its_stage_is_not_whole(tmp_path, harm, capsys):
    folder = RunFolder(tmp_path / "run", job())
    finish_all(folder)
    file = folder / "search.out"
    if harm == "missing":
        file.unlink()
    else:
        file.write_text("searcH")
    assert [stage for stage in STAGES if not folder.whole(stage)] == ["search"]
    assert str(file) in capsys.readouterr().out


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="not a run folder"):
        RunFolder(tmp_path, job())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run", job())


@pytest.mark.parametrize(
    ("settings", "key", "first"),
    [
        ({}, "learning_rate", "train"),
        ({"estimator": {"calibrate": 2}}, "learning_rate", "search"),
        ({"gradients": {"start": "meta"}}, "learning_rate", "gradients"),
        ({"gradients": {"start": "meta"}, "estimator": {"calibrate": 2}}, "epochs", "search"),
    ],
)
def test_stages_that_train_for_themselves_depend_on_how(tmp_path, settings, key, first):
    """The common start is trained before the gradients, and calibration's subsets before the search."""
    finish_all(RunFolder(tmp_path / "run", job(**settings)))
    value = 5 if key == "epochs" else 5.0e-3
    again = RunFolder(tmp_path / "run", job(**settings, training={key: value}), redo=True)
    place = STAGES.index(first)
    assert [again.finished(stage) for stage in STAGES] == [True] * place + [False] * (len(STAGES) - place)


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"training": {"learning_rate": 0.1}}, False),
        ({"gradients": {"dim": 100}}, False),
        ({"ensemble": {"weights": "own"}}, True),
    ],
)
def test_a_validation_of_another_job_is_dropped(tmp_path, changes, kept):
    """The report would show it as this one's."""
    folder = RunFolder(tmp_path / "run", job())
    finish_all(folder)
    (folder / "validation.json").write_text("{}")
    RunFolder(tmp_path / "run", job(**changes), redo=True)
    assert (folder / "validation.json").exists() == kept
