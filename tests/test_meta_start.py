"""`gradients.start: meta`: one short training on all tasks, where gradients are taken and every adapter starts."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import write_job

from ray_ensemble import Job
from ray_ensemble.ensemble import Predictor
from ray_ensemble.files import sha256_file
from ray_ensemble.gradients import GradientStore
from ray_ensemble.gradients.per_example import GradientCollector
from ray_ensemble.gradients.projection import Projection
from ray_ensemble.models import (
    LabelTree,
    attach_adapters,
    label_scores,
    load_base,
    load_tokenizer,
    make_batch,
    score_loss,
)
from ray_ensemble.real_runs import fine_tune
from ray_ensemble.run_folder import RunFolder
from ray_ensemble.stages import Stages, encode_all
from ray_ensemble.tasks import load_tasks
from ray_ensemble.training import sample_batch

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_gradients_are_taken_and_adapters_trained_from_the_meta_start(ray_cluster, tiny_model, task_folder, tmp_path):
    path = write_job(
        tmp_path, tiny_model, task_folder,
        gradients={"dim": 64, "replicas": 2, "start": "meta", "meta_steps": 12},
        training={"epochs": 1, "min_steps": 4, "learning_rate": 5.0e-3, "checkpoint_every": 4},
        ensemble={"weights": "uniform"},
    )  # fmt: skip
    job = Job.from_yaml(path)
    folder = job.gradients(tmp_path / "run").folder
    start, drawn = folder / "start", folder / "init"
    trained, fresh = (load_file(at / "adapter_model.safetensors") for at in (start, drawn))
    assert all(not value.any() for name, value in fresh.items() if "lora_B" in name)
    assert all(value.any() for name, value in trained.items() if "lora_B" in name)

    store = GradientStore.open(folder / "gradients")
    assert store.info["adapter"] == sha256_file(start / "adapter_model.safetensors")
    config = job.config
    tasks = {
        t.name: t
        for t in encode_all(load_tasks(config.tasks, config.limits, Path()), load_tokenizer(tiny_model), config)
    }
    model = attach_adapters(load_base(tiny_model, "none", torch.device("cpu")), {"default": start})
    task = tasks["films"]
    tree = LabelTree.of(task.label_ids)
    batch = make_batch(task["train"][:3], [tree] * 3, 2, 0, torch.device("cpu"))
    collector = GradientCollector(model, Projection(64, config.gradients.seed))
    assert not collector.fresh
    want = collector.collect([batch], "margin").features.numpy()
    found = store["films", "train"].features[:3]
    assert np.abs(found - want).max() < 1e-4 * np.abs(want).max()

    with ExitStack() as stack:
        (run,) = fine_tune(Stages(RunFolder(folder, config), stack), [((0, 1), 0)])
    names = list(tasks)
    assert first_loss(run.folder) == pytest.approx(batch_loss(model, tasks, names[:2], config), rel=1e-3)

    # The baseline has no part in the common start: it gets those steps too, from θ₀ as it was drawn.
    job.train(folder)
    steps = [json.loads((path / "result.json").read_text())["steps"] for path in (folder / "adapters").iterdir()]
    baseline = folder / "baselines" / "qlora_all"
    assert json.loads((baseline / "result.json").read_text())["steps"] == 12 + sum(steps)
    untrained = attach_adapters(load_base(tiny_model, "none", torch.device("cpu")), {"default": drawn})
    assert first_loss(baseline) == pytest.approx(batch_loss(untrained, tasks, names, config), rel=1e-3)

    # It is one of the adapters that are weighed. With all weights alike every stage has to do with it.
    job.through("evaluate", folder)
    ensemble = json.loads((folder / "ensemble.json").read_text())
    groups = json.loads((folder / "partition.json").read_text())["m"]
    assert ensemble["adapters"] == [*(f"group-{g}" for g in range(groups)), "start"]
    assert ensemble["weights"]["films"] == pytest.approx([1 / (groups + 1)] * (groups + 1))
    metrics = json.loads((folder / "metrics.json").read_text())["tasks"]
    rows = [json.loads(line) for line in (task_folder / "films" / "test.jsonl").read_text().splitlines()]
    found = Predictor(folder, ["films"]).predict([("films", row) for row in rows])
    losses = [
        -np.log(list(each["probabilities"].values())[row["label"]]) for each, row in zip(found, rows, strict=True)
    ]
    assert np.mean(losses) == pytest.approx(metrics["films"]["ensemble"]["loss"], rel=1e-4)
    assert metrics["films"]["ensemble"]["loss"] != metrics["films"]["group"]["loss"]


def first_loss(adapter: Path) -> float:
    return json.loads((adapter / "train.jsonl").read_text().splitlines()[0])["loss"]


def batch_loss(model, tasks, members, config) -> float:
    """Mean loss of the examples of a first training step on `members`, one by one."""
    pool = [(tasks[name], example) for name in members for example in tasks[name]["train"]]
    losses = []
    for i in sample_batch(0, len(pool), config.training.batch_size, config.training.seed):
        member, example = pool[i]
        one = make_batch([example], [LabelTree.of(member.label_ids)], len(member.labels), 0, torch.device("cpu"))
        with torch.no_grad():
            losses.append(float(score_loss(label_scores(model, one), one.labels)))
    return float(np.mean(losses))
