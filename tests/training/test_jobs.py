"""Ray Train jobs: packs equal separate jobs, and what fails for good stops nobody else."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_disk import small_disk

from ray_ensemble import RunError
from ray_ensemble.config import AdapterConfig, JobConfig, ModelConfig, TaskConfig, TrainingConfig
from ray_ensemble.gradients import ReplicaSpec
from ray_ensemble.models import attach_adapters, draw_initial_adapter, load_base
from ray_ensemble.runtime import living_controllers
from ray_ensemble.training import AdapterJob, StartingPoint, train_adapter, train_adapters
from ray_ensemble.training.jobs import FAILURES

pytestmark = pytest.mark.ray
CPU = torch.device("cpu")
BASE = {"model": "tiny", "quantization": "none", "adapter": "drawn"}
SETTINGS = TrainingConfig(batch_size=4, learning_rate=5e-3, checkpoint_every=3)


@pytest.fixture(scope="module")
def initial(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs") / "init"
    draw_initial_adapter(load_base(tiny_model, "none", CPU), AdapterConfig(), folder)
    return folder


def train(jobs, tasks, tiny_model, initial, folder, **settings):
    config = JobConfig(
        model=ModelConfig(source=str(tiny_model)),
        tasks=[TaskConfig(source="data")],
        training=SETTINGS.model_copy(update=settings),
    )
    spec = asdict(ReplicaSpec(str(tiny_model), "none", str(initial), 0))
    return train_adapters(jobs, tasks, config, folder, spec, BASE)


def alone(job, tasks, tiny_model, initial) -> dict[str, torch.Tensor]:
    model = attach_adapters(load_base(tiny_model, "none", CPU), {"default": initial}, trainable="default")
    members = [task for task in tasks if task.name in job.members]
    train_adapter(model, members, SETTINGS, job.steps, job.seed, 0)
    return {n.replace(".default.", "."): p.detach() for n, p in model.named_parameters() if "lora_" in n}


def assert_equal(folder: Path, wanted: dict[str, torch.Tensor]) -> None:
    found = load_file(folder / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    assert max(float((found[name] - wanted[name]).abs().max()) for name in wanted) < 1e-4


def broken(initial: Path, folder: Path) -> StartingPoint:
    """A starting point whose loss is no number."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text((initial / "adapter_config.json").read_text())
    tensors = load_file(initial / "adapter_model.safetensors")
    save_file({n: torch.full_like(t, math.nan) for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    return StartingPoint(folder, "broken")


def test_a_pack_equals_separate_jobs_and_one_failure_stops_nobody(ray_cluster, tasks, tiny_model, initial, tmp_path):
    """Four adapters in one process, one of them from a starting point that has no loss."""
    names = [task.name for task in tasks]
    jobs = [
        AdapterJob("pair", (names[0], names[1]), 7, 1),
        AdapterJob("lost", (names[2],), 6, 2, broken(initial, tmp_path / "broken")),
        AdapterJob("single", (names[3],), 4, 0),
        AdapterJob("other", (names[1], names[2]), 5, 3),
    ]
    run = tmp_path / "run"
    with pytest.raises(RunError) as raised:
        train(jobs, tasks, tiny_model, initial, run, pack=4, concurrency=1)
    said = str(raised.value)
    assert "1 of 4 adapters could not be trained (3 are kept)" in said
    assert "lost: the loss is nan at step 0" in said
    assert "pair" not in said
    failures = json.loads((run / FAILURES).read_text())
    assert failures["status"] == "partial"
    assert (set(failures["failed"]), set(failures["trained"])) == ({"lost"}, {"pair", "single", "other"})
    sound = [job for job in jobs if job.name != "lost"]
    done = train(sound, tasks, tiny_model, initial, run)  # from the cache: nothing of Ray Train runs
    assert not (run / FAILURES).exists()
    for job in sound:
        assert_equal(done[job.name].folder, alone(job, tasks, tiny_model, initial))
        rows = [json.loads(line) for line in (done[job.name].folder / "train.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(job.steps))
        assert done[job.name].tokens == sum(row["tokens"] for row in rows)
    assert len(list((run / "trained").iterdir())) == 3


@pytest.fixture
def small_output(tmp_path):
    with small_disk(tmp_path / "disk", 1) as folder:
        yield folder


def test_different_adapters_of_one_name_are_refused(tasks, tiny_model, initial, tmp_path):
    """Else one would be filed as the other."""
    names = [task.name for task in tasks]
    jobs = [AdapterJob("pair", (names[0], names[1]), steps, 0) for steps in (3, 4)]
    with pytest.raises(ValueError, match="'pair'"):
        train(jobs, tasks, tiny_model, initial, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.chaos
def test_a_full_disk_is_told_and_the_same_call_goes_on_once_there_is_room(
    ray_cluster, tasks, tiny_model, initial, small_output
):
    job = AdapterJob("single", (tasks[0].name,), 12, 0)
    ballast = small_output / "ballast"
    with pytest.raises(OSError, match="No space"):
        ballast.write_bytes(b"x" * 2**21)
    os.truncate(ballast, 2**20 - 24_000)  # room for a checkpoint, not for two
    with pytest.raises(RunError) as raised:
        train([job], tasks, tiny_model, initial, small_output / "run", max_failures=0)
    assert "single: the disk of the run folder is full; free some space" in str(raised.value)
    assert "The same command trains only these again" in str(raised.value)
    ballast.unlink()
    done = train([job], tasks, tiny_model, initial, small_output / "run")
    assert_equal(done["single"].folder, alone(job, tasks, tiny_model, initial))


def test_ctrl_c_ends_the_runs_and_gives_back_what_they_hold(
    obeys_ctrl_c, ray_cluster, tasks, tiny_model, initial, tmp_path
):
    """Hours of training, a job under way and one that waits, in a process that lives on, as a notebook does."""
    import ray

    names, run = [task.name for task in tasks], tmp_path / "run"
    jobs = [AdapterJob(name, (name,), 500_000 + i, i) for i, name in enumerate(names[:2])]
    main = threading.main_thread().ident

    def interrupt() -> None:
        while not any(log.stat().st_size for log in run.glob("checkpoints/*/logs/*.jsonl")):
            time.sleep(0.1)
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        train(jobs, tasks, tiny_model, initial, run, pack=1, concurrency=1)
    assert not living_controllers()
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, "what the run held was not given back"
        time.sleep(0.1)
    assert not living_controllers(), "it was started again"
    assert len(list(run.glob("checkpoints/*"))) == 1, "the second was begun"
