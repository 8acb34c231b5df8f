"""Several workers of one job as Ray Train runs them."""

from __future__ import annotations

import json

import pytest
from test_parallel import alone, assert_same_format, initial, needs_deepspeed, tasks  # noqa: F401 (fixtures)

from ray_ensemble.config import load_config
from ray_ensemble.errors import InputError
from ray_ensemble.files import read_json
from ray_ensemble.training import AdapterJob, jobs, train_adapters

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SETTINGS = {"batch_size": 6, "checkpoint_every": 4, "batch_tokens": 60, "early_stop": "{every: 3, patience: 9}"}


def train(whole_job, tiny_model, initial, tasks, folder, **changes):  # noqa: F811
    settings = {**SETTINGS, **changes}
    config = load_config(whole_job, [f"training.{key}={value}" for key, value in settings.items()])
    model = {"source": str(tiny_model), "quantization": "none", "initial_adapter": str(initial), "pad_id": 0}
    job = AdapterJob("both", tuple(task.name for task in tasks), 8, 3)
    return train_adapters([job], tasks, config, folder, model, {"model": "m", "adapter": "a"})["both"]


@needs_deepspeed
def test_two_workers_under_zero3_leave_the_adapter_of_one(
    ray_cluster, whole_job, tiny_model, initial, tasks, alone, tmp_path  # noqa: F811
):  # fmt: skip
    found = train(whole_job, tiny_model, initial, tasks, tmp_path, strategy="zero3", workers=2, cpus=0.5)
    assert_same_format(found.folder, alone[1], besides=("train.jsonl", "result.json"))
    rows = [json.loads(line) for line in (found.folder / "train.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(8))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in alone[0].rows], rel=1e-3)
    assert (found.steps, found.tokens) == (8, alone[0].state.tokens)
    assert read_json(found.folder / "result.json")["peak_memory_bytes"] > 0
    assert not (tmp_path / "checkpoints" / found.key).exists()


def test_auto_gives_a_job_that_is_alone_all_that_may_run_at_once(
    ray_cluster, whole_job, tiny_model, initial, tasks, alone, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    asked, to_its_end = [], jobs._PackRun.to_its_end

    def seen(run):
        asked.append(run.demand.workers)
        to_its_end(run)

    monkeypatch.setattr(jobs._PackRun, "to_its_end", seen)
    found = train(whole_job, tiny_model, initial, tasks, tmp_path, workers="auto", concurrency=2, cpus=0.5)
    assert asked == [2]
    rows = [json.loads(line) for line in (found.folder / "train.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in alone[0].rows], rel=1e-3)
    assert found.tokens == alone[0].state.tokens


def test_more_workers_than_the_cluster_holds_are_refused(
    ray_cluster, whole_job, tiny_model, initial, tasks, tmp_path  # noqa: F811
):  # fmt: skip
    with pytest.raises(
        InputError, match=r"asks for 600 CPUs .* lower training.cpus, training.gpus or training.workers"
    ):
        train(whole_job, tiny_model, initial, tasks, tmp_path, workers=6, cpus=100)
