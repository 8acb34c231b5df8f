"""A whole run of a base that no process ever holds ends where the run does whose processes hold all of it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import holdings
import numpy as np
import pytest
from safetensors.torch import load_file
from tiny import write_job, write_model, write_task

from ray_ensemble import Job
from ray_ensemble.gradients import GradientStore
from ray_ensemble.run_folder import STAGES

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed"),
]
SHARDED = ["gradients.shards=2", "training.strategy=zero3", "training.workers=2"]


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    # Two tasks that contradict each other in one group, so that there is something left for a booster.
    write_task(folder / "tasks" / "films", seed=1, train=64, validation=40, test=20)
    write_task(folder / "tasks" / "contrary", flip=True, seed=3, train=64, validation=40, test=20)
    return write_job(
        folder, write_model(folder / "model", layers=4), folder / "tasks",
        gradients={"dim": 64, "replicas": 1}, search={"groups": [1], "trials": 1}, boosting={"steps": 1},
        training={"epochs": 1, "min_steps": 4, "learning_rate": 1.0e-3},
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(job, ray_cluster) -> Path:
    return Job.from_yaml(job).run(job.parent / "whole").folder


@pytest.fixture(scope="module")
def sharded(job) -> Path:
    (job.parent / "holdings").mkdir()
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "sharded_run.py"), str(job), str(job.parent / "sharded"), *SHARDED],
        env={
            **os.environ,
            holdings.FOLDER: str(job.parent / "holdings"),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
        },
        capture_output=True, text=True, timeout=1100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return job.parent / "sharded"


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.timeout(2400)
def test_the_sharded_run_ends_where_the_unsharded_one_does(sharded, whole):
    for stage in STAGES:
        assert (sharded / "manifests" / f"{stage}.json").is_file(), stage
    for name in ("plan.json", "tasks.json", "init/adapter_model.safetensors"):
        assert (sharded / name).read_bytes() == (whole / name).read_bytes(), name
    ours, theirs = (GradientStore.open(folder / "gradients") for folder in (sharded, whole))
    for task in theirs.tasks:
        a, b = ours[task, "train"].features, theirs[task, "train"].features
        assert (np.linalg.norm(a - b, axis=1) < 1e-4 * np.linalg.norm(b, axis=1)).all()
    assert read(sharded, "partition")["groups"] == read(whole, "partition")["groups"]
    a, b = read(sharded, "ensemble"), read(whole, "ensemble")
    for task, weights in b["weights"].items():
        np.testing.assert_allclose(a["weights"][task], weights, atol=0.01)
    (mine,), (row,) = a["boosting"]["history"], b["boosting"]["history"]
    assert mine["group"] == row["group"]
    assert mine["kept"] == row["kept"]
    assert row["distance"] > 0, "a booster was lifted"
    for key in ("train_loss", "validation_loss"):
        np.testing.assert_allclose(mine[key], row[key], rtol=1e-3)
    for folder in sorted((whole / "adapters").iterdir()) + sorted((whole / "boosters").glob("*")):
        found = load_file(sharded / folder.relative_to(whole) / "adapter_model.safetensors")
        wanted = load_file(folder / "adapter_model.safetensors")
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value, atol=2e-4)
    for task, models in read(whole, "metrics")["tasks"].items():
        for model, metric in models.items():
            assert read(sharded, "metrics")["tasks"][task][model]["loss"] == pytest.approx(metric["loss"], rel=1e-3)
            assert read(sharded, "metrics")["tasks"][task][model]["n"] == metric["n"]


@pytest.mark.timeout(2400)
def test_no_process_of_it_ever_held_the_whole_base(sharded, job):
    everything = sum(value.nbytes for value in load_file(job.parent / "model" / "model.safetensors").values())
    notes = holdings.read(job.parent / "holdings")
    held = [bytes_ for loads in notes.values() for bytes_ in loads]
    assert max(held) < 0.6 * everything
    # The driver's shapes; two shards each for gradients, scores and boosters; two workers each for the adapters.
    assert sum(bytes_ == 0 for bytes_ in held) == 1
    assert sum(bytes_ > 0.4 * everything for bytes_ in held) >= 8
