"""Boosting in a whole run: boosters that load, count, predict and merge; without them not a byte differs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax
from tiny import write_job, write_task

from ray_ensemble import Job
from ray_ensemble.ensemble import Predictor

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def unboosted(ray_cluster, tiny_model, tmp_path_factory) -> Path:
    """A finished run without boosting: one short training on two tasks that contradict each other."""
    folder = tmp_path_factory.mktemp("boosting")
    write_task(folder / "tasks" / "films", seed=1, train=64, validation=40, test=40)
    write_task(folder / "tasks" / "contrary", flip=True, seed=3, train=96, validation=40, test=40)
    job = write_job(
        folder, tiny_model, folder / "tasks",
        gradients={"dim": 64, "replicas": 2, "max_examples": 80},
        search={"groups": [1], "trials": 1},
        training={"epochs": 1, "min_steps": 4, "learning_rate": 1.0e-3},
    )  # fmt: skip
    return Job.from_yaml(job).run(folder / "run").folder


def boosted(unboosted: Path, folder: Path, *changes: str) -> Path:
    shutil.copytree(unboosted, folder)
    Job.from_yaml(unboosted / "config.yaml", [f"boosting.{change}" for change in changes]).run(folder, redo=True)
    return folder


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def ridge(unboosted, tmp_path_factory) -> Path:
    return boosted(unboosted, tmp_path_factory.mktemp("ridge") / "run", "steps=2")


def test_boosting_lowers_the_losses_that_it_says_it_lowers(ridge, unboosted):
    boosting = read(ridge, "ensemble")["boosting"]
    assert boosting["adapters"][0] == "booster-0"
    assert sorted(p.name for p in (ridge / "boosters").iterdir()) == boosting["adapters"]
    kept = [row for row in boosting["history"] if row["kept"]]
    assert [row["adapter"] for row in kept] == boosting["adapters"]
    for row in kept:
        assert row["validation_loss"][1] < row["validation_loss"][0]
    assert kept[0]["train_loss"][1] < kept[0]["train_loss"][0]
    assert kept[0]["distance"] <= 0.02 + 1e-9
    assert (boosting["stopped"] is None) == (len(kept) == 2)
    metrics = read(ridge, "metrics")
    for task, models in read(unboosted, "metrics")["tasks"].items():
        assert "ensemble_unboosted" not in models
        ours = metrics["tasks"][task]
        assert ours["ensemble_unboosted"] == models["ensemble"]
        # Test data have no say in boosting, so whether it helps there is not for a test to ask.
        assert (ours["ensemble"] == ours["ensemble_unboosted"]) == (not boosting["boosters"].get(task))
    flops = metrics["flops"]
    parts = [flops[part] for part in ("gradients", "search", "groups", "boosting", "ensemble", "merging")]
    assert flops["boosting"] > 0
    assert flops["ratio"] == pytest.approx(sum(parts) / flops["qlora_all"])
    assert "without boosting" in (ridge / "report.html").read_text()
    assert "without boosting" not in (unboosted / "report.html").read_text()


def test_prediction_is_the_documented_sum(ridge, unboosted):
    """β Σ w s + η Σ (s_b − s_base), put together by hand from single adapters of the same run."""
    ensemble = read(ridge, "ensemble")
    task = next(iter(ensemble["boosting"]["boosters"]))
    rows = [{"text": "a very good film"}, {"text": "it was bad and sad"}, {"text": "the phone felt so"}]

    def alone(name: str) -> np.ndarray:
        changed = {**ensemble, "adapters": [name], "weights": {task: [1.0]}, "scales": {}, "boosting": {}}
        copy = ridge.parent / f"only-{name}"
        shutil.copytree(ridge, copy)
        (copy / "ensemble.json").write_text(json.dumps(changed))
        for booster in (copy / "boosters").iterdir():
            shutil.copytree(booster, copy / "adapters" / booster.name)
        shutil.copytree(copy / "init", copy / "adapters" / "init")
        found = Predictor(copy, [task]).predict([(task, row) for row in rows])
        return np.log([list(row["probabilities"].values()) for row in found])

    scores = sum(w * alone(name) for name, w in zip(ensemble["adapters"], ensemble["weights"][task], strict=True) if w)
    scores, start = ensemble["scales"][task] * scores, alone("init")
    for booster in ensemble["boosting"]["boosters"][task]:
        scores = scores + ensemble["boosting"]["step_sizes"][task] * (alone(booster) - start)
    found = [
        list(row["probabilities"].values()) for row in Predictor(ridge, [task]).predict([(task, row) for row in rows])
    ]
    np.testing.assert_allclose(found, softmax(scores, axis=1), atol=1e-3)
    plain = [
        list(row["probabilities"].values())
        for row in Predictor(unboosted, [task]).predict([(task, row) for row in rows])
    ]
    assert np.abs(np.array(found) - np.array(plain)).max() > 1e-3


def test_a_damaged_booster_is_made_again_to_the_bit_and_no_step_leaves_no_trace(ridge, unboosted, tmp_path, capsys):
    copy = shutil.copytree(ridge, tmp_path / "copy")
    victim = copy / "boosters" / "booster-0" / "adapter_model.safetensors"
    good = victim.read_bytes()
    victim.write_bytes(good[:-5] + b"spoil")
    job = Job.from_yaml(copy / "config.yaml")
    job.run(copy)
    assert "damaged" in capsys.readouterr().out
    assert victim.read_bytes() == good
    assert (copy / "ensemble.json").read_bytes() == (ridge / "ensemble.json").read_bytes()
    Job.from_yaml(unboosted / "config.yaml").run(copy, redo=True)
    assert not (copy / "boosters").exists()
    for name in ("ensemble.json", *(str(p.relative_to(unboosted)) for p in (unboosted / "merged").rglob("*.*"))):
        assert (copy / name).read_bytes() == (unboosted / name).read_bytes(), name
    ours, theirs = read(copy, "metrics"), read(unboosted, "metrics")
    assert (ours["tasks"], ours["flops"]) == (theirs["tasks"], theirs["flops"])


def test_boosters_can_be_trained(unboosted, tmp_path):
    folder = boosted(unboosted, tmp_path / "run", "steps=1", "method=train", "train_steps=12")
    (row,) = read(folder, "ensemble")["boosting"]["history"]
    assert row["steps"] == 12
    assert row["kept"]
    assert row["train_loss"][1] < row["train_loss"][0]
    assert len((folder / "boosters" / "booster-0" / "train.jsonl").read_text().splitlines()) == 12
    first = json.loads((folder / "boosters" / "booster-0" / "train.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(row["train_loss"][0], rel=0.3), "it begins at the ensemble's loss"
