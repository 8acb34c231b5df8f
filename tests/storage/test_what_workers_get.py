"""What is sent to workers of a run at a URL: the URL, and neither a path of the driver's nor a credential."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray.train.torch
import torch
from ray import cloudpickle

from ray_ensemble.config import GradientsConfig, JobConfig
from ray_ensemble.ensemble import scoring
from ray_ensemble.gradients import ReplicaSpec
from ray_ensemble.pool import PoolSize
from ray_ensemble.run_folder import RunFolder, open_run
from ray_ensemble.storage import bring, drop, located, run_copy, run_of
from ray_ensemble.storage import lease as lease_module
from ray_ensemble.tasks import EncodedExample, EncodedTask
from ray_ensemble.training import jobs
from ray_ensemble.training.cache import AdapterJob, StartingPoint, finished
from ray_ensemble.training.pack import Pack, note_interruption
from ray_ensemble.training.worker import within_memory

CONFIG = JobConfig.model_validate({"model": {"source": "a/b"}, "tasks": ["/data"]})
EXAMPLE = EncodedExample((1, 2, 3), 0, False)
TASK = EncodedTask("films", ("no", "yes"), ((4,), (5,)), {"train": (EXAMPLE,), "validation": (EXAMPLE,)}, "hash")


@contextmanager
def opened(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[RunFolder, Path]]:
    monkeypatch.setattr(lease_module, "SETTLE_SECONDS", 0.0)
    with open_run(s3, CONFIG) as folder:
        adapter = folder / "init"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text("{}")
        (adapter / "adapter_model.safetensors").write_text("theta")
        yield folder, adapter


def assert_clean(sent: Any, folder: RunFolder) -> None:
    data = cloudpickle.dumps(sent)
    assert os.environ["RAY_ENSEMBLE_CACHE"].encode() not in data
    assert str(folder.path).encode() not in data
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert os.environ[name].encode() not in data


def test_training_workers(s3, monkeypatch):
    sent: dict[str, Any] = {}

    class Recorded:
        def __init__(self, function: Any, **arguments: Any) -> None:
            sent.update(function=function, **arguments)

        def fit(self) -> None:
            pass

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Recorded)
    with opened(s3, monkeypatch) as (folder, adapter):
        start = StartingPoint(located(folder.path, adapter), "h")
        pack = Pack("key", {"key": AdapterJob("group-0", ("films",), 4, 0, start)})
        spec = {"source": "a/b", "quantization": "none", "initial_adapter": located(folder.path, adapter), "pad_id": 0}
        jobs._PackRun(pack, [TASK], CONFIG.training, jobs._Demand(1, 1.0, 0.0), folder.path, spec).to_its_end(
            threading.Event()
        )
        assert sent["train_loop_config"]["run"] == s3
        assert sent["run_config"].storage_path == f"{s3.removeprefix('s3://')}/checkpoints"
        assert_clean(sent, folder)


def test_scoring_actors(s3, monkeypatch):
    sent: list[Any] = []

    def map_units(kind: Any, method: str, units: Any, **_: Any) -> None:
        sent.append((kind, units))
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "map_units", map_units)
    monkeypatch.setattr(scoring, "PlainActors", lambda *arguments: arguments)
    monkeypatch.setattr(scoring, "pool_size", lambda *_: PoolSize(1, 1))
    with opened(s3, monkeypatch) as (folder, adapter):
        spec = ReplicaSpec("a/b", "none", located(folder.path, adapter), 0)
        requests = [scoring.ScoreRequest(each, TASK, (EXAMPLE,)) for each in (adapter, None)]
        with pytest.raises(KeyboardInterrupt):
            scoring.score_all(requests, spec, GradientsConfig(), {}, folder.path, "scores")
        assert {request.adapter for request in sent[0][1].values()} == {located(folder.path, adapter), None}
        assert_clean(sent, folder)


@pytest.mark.slow
def test_a_training_worker_hands_back_its_adapter_and_its_log(s3, monkeypatch, tiny_model, task_folder):
    """In Ray Train's local mode, which has no cluster; then a second attempt, on a node that has nothing of the first."""
    from ray_ensemble.config import TaskConfig, TrainingConfig
    from ray_ensemble.models import draw_initial_adapter, load_base, load_tokenizer
    from ray_ensemble.tasks import encode_task, load_tasks
    from ray_ensemble.training.worker import train_worker

    tasks = load_tasks([TaskConfig(source=str(task_folder / "films"))], CONFIG.limits, task_folder)
    encoded = encode_task(tasks[0], load_tokenizer(tiny_model), 64)
    with opened(s3, monkeypatch) as (folder, adapter):
        draw_initial_adapter(load_base(tiny_model, "none", torch.device("cpu")), CONFIG.adapter, adapter)
        start = located(folder.path, adapter)
        pack = Pack("key", {"key": AdapterJob("group-0", ("films",), 6, 0)})
        settings = {
            "pack": pack,
            "tasks": [encoded],
            "training": TrainingConfig(checkpoint_every=2),
            "run": run_of(folder.path),
            "model": {"source": str(tiny_model), "quantization": "none", "initial_adapter": start, "pad_id": 0},
            "watched": False,
        }
        for _ in range(2):
            ray.train.torch.TorchTrainer(
                train_worker, train_loop_config=settings, scaling_config=ray.train.ScalingConfig(num_workers=0)
            ).fit()
            assert finished(folder.path, "key") is None
            bring(folder.path, "trained/key", "checkpoints/key/logs")
            trained = finished(folder.path, "key")
            assert trained is not None
            assert trained.steps == 6
            log = pack.log(folder.path, "key")
            assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(6))
            drop(folder.path, "trained")


def test_a_kill_for_memory_is_known_to_the_next_attempt_on_any_node(s3, monkeypatch):
    """The note is written by Ray Train's controller, on whichever node that is."""
    training = CONFIG.training.model_copy(update={"batch_tokens": 256})
    pack = Pack("key", {})
    with opened(s3, monkeypatch):
        for kills in (1, 2):
            with run_copy(s3, pack.read_by(1)) as copy:
                note_interruption(pack.folder(copy.folder), "memory")
            for rank in (0, 1):
                with run_copy(s3, pack.read_by(rank)) as copy:
                    assert within_memory(training, pack.folder(copy.folder), "cpu").batch_tokens == 256 >> kills
