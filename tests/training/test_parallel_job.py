"""Several workers of one job as Ray Train runs them."""

from __future__ import annotations

import json

import pytest
from test_parallel import alone, assert_same_format, initial, needs_deepspeed, tasks  # noqa: F401 (fixtures)

from ray_ensemble.config import load_config
from ray_ensemble.errors import InputError, RunError
from ray_ensemble.files import read_json
from ray_ensemble.training import AdapterJob, jobs, train_adapters
from ray_ensemble.training.pack import interruptions

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


def full_above(tokens):
    """`train_worker` where the second worker's memory holds micro-batches of so many padded tokens."""

    def worker(settings):
        import ray.train
        import torch

        from ray_ensemble.training.loop import Loop
        from ray_ensemble.training.worker import train_worker

        held = Loop._losses

        def losses(loop, rows):
            if len(rows) * max(row.length for row in rows) > tokens:
                raise torch.OutOfMemoryError("full")
            return held(loop, rows)

        if ray.train.get_context().get_world_rank() == 1:
            Loop._losses = losses
        train_worker(settings)

    return worker


@needs_deepspeed
@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp2"])
def test_one_worker_out_of_memory_in_a_collective_pass_starts_all_again_with_smaller_micro_batches(
    strategy, ray_cluster, whole_job, tiny_model, initial, tasks, alone, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    monkeypatch.setattr(jobs, "train_worker", full_above(45))
    noted, drop = [], jobs.drop

    def dropped(folder, name):
        noted.append(interruptions(folder / name))
        drop(folder, name)

    monkeypatch.setattr(jobs, "drop", dropped)
    changes = {"strategy": strategy, "workers": 2, "cpus": 0.5, "batch_tokens": 80, "max_failures": 1}
    found = train(whole_job, tiny_model, initial, tasks, tmp_path, **changes)
    assert noted[-1] == ["memory"]
    rows = [json.loads(line) for line in (found.folder / "train.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(8))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in alone[0].rows], rel=1e-3)


@needs_deepspeed
def test_an_example_that_does_not_fit_on_one_worker_ends_the_job_at_once_until_it_is_run_again(
    ray_cluster, whole_job, tiny_model, initial, tasks, alone, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    began, trains = tmp_path / "began", full_above(1)

    def counted(settings):
        with began.open("a") as stream:
            stream.write("x")
        trains(settings)

    changes = {"strategy": "zero3", "workers": 2, "cpus": 0.5, "batch_tokens": 1, "max_failures": 5}
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "train_worker", counted)
        with pytest.raises(RunError, match=r"(?s)1 of 1 adapters.*one example.*lower limits.max_tokens"):
            train(whole_job, tiny_model, initial, tasks, tmp_path, **changes)
    assert len(began.read_text()) == 4  # two workers, and once more for Ray Train to hear that there is nothing to do
    assert train(whole_job, tiny_model, initial, tasks, tmp_path, **changes).steps == 8


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
