"""Adapters as Ray Train jobs: every group is one `TorchTrainer`, as many at once as resources and `concurrency` allow."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ray_ensemble.config import JobConfig, TrainingConfig
from ray_ensemble.errors import InputError, RunError
from ray_ensemble.progress import Bar
from ray_ensemble.runtime import cluster_cpus, cluster_gpus
from ray_ensemble.tasks import EncodedTask
from ray_ensemble.training.cache import AdapterJob, TrainedAdapter, finished, job_key
from ray_ensemble.training.worker import read_row, train_worker

_START_TIMEOUT_S = "300"


def train_adapters(
    jobs: Sequence[AdapterJob],
    tasks: Sequence[EncodedTask],
    config: JobConfig,
    folder: Path,
    model: dict[str, Any],
    base: dict[str, str],
) -> dict[str, TrainedAdapter]:
    """Train every job that is not in the cache, side by side; biggest first.

    Args:
        jobs: adapters wanted.
        tasks: all encoded tasks of the run.
        config: the job.
        folder: the run folder; adapters go to `trained/<key>`, Ray Train's checkpoints to `checkpoints/<key>`.
        model: what a worker needs to load the base: source, quantization, initial adapter folder, pad id.
        base: hashes of the base and of θ₀, part of the cache's keys.

    Returns:
        Job name -> trained adapter.

    Raises:
        InputError: a job asks for more than the cluster has.
        RunError: a job failed for good; the others are finished first and kept.
    """
    keys = {job.name: job_key(job, tasks, config, base) for job in jobs}
    wanted: dict[str, AdapterJob] = {}
    for job in jobs:
        if finished(folder, keys[job.name]) is None:
            wanted.setdefault(keys[job.name], job)
    if wanted:
        _run_all(wanted, {task.name: task for task in tasks}, config, folder, model)
    done = {job.name: finished(folder, keys[job.name]) for job in jobs}
    missing = [name for name, adapter in done.items() if adapter is None]
    if missing:
        raise RunError(f"training of {', '.join(missing)} left no adapter")
    return {name: adapter for name, adapter in done.items() if adapter is not None}


def _run_all(
    wanted: dict[str, AdapterJob],
    tasks: dict[str, EncodedTask],
    config: JobConfig,
    folder: Path,
    model: dict[str, Any],
) -> None:
    training = config.training
    gpus = _gpus_per_job(training)
    job_cpus, job_gpus = training.cpus * training.workers, gpus * training.workers
    if job_cpus > cluster_cpus() or job_gpus > cluster_gpus():
        raise InputError(
            f"training asks for {job_cpus:g} CPUs and {job_gpus:g} GPUs a job, the cluster has {cluster_cpus()} CPUs "
            f"and {cluster_gpus()} GPUs: lower training.cpus, training.gpus or training.workers"
        )
    # A job that waits for resources costs a controller process that polls, so no more are submitted than fit.
    fitting = int(min(cluster_cpus() / job_cpus, cluster_gpus() / job_gpus if gpus else float("inf")))
    at_once = min(len(wanted), fitting if training.concurrency == "auto" else training.concurrency)
    ordered = sorted(wanted.items(), key=lambda item: -item[1].steps)
    total = sum(job.steps for job in wanted.values())
    failures: dict[str, BaseException] = {}
    with Bar(f"training {len(wanted)} adapters", total, "steps") as bar, ThreadPoolExecutor(at_once) as threads:
        futures = {}
        for key, job in ordered:
            members = [tasks[name] for name in tasks if name in job.members]
            futures[threads.submit(_run_one, key, job, members, training, gpus, folder, model)] = job
        stop = threading.Event()
        watcher = threading.Thread(target=_watch, args=(wanted, folder, bar, stop), daemon=True)
        watcher.start()
        try:
            for future, job in futures.items():
                error = future.exception()
                if error is not None:
                    failures[job.name] = error
        finally:
            stop.set()
            watcher.join()
    if failures:
        text = "; ".join(f"{name}: {_reason(error)}" for name, error in failures.items())
        raise RunError(
            f"{len(failures)} of {len(wanted)} training jobs failed ({text}); the same command trains only these again"
        )


def _gpus_per_job(training: TrainingConfig) -> float:
    if training.gpus == "auto":
        return 1.0 if cluster_gpus() else 0.0
    return training.gpus


def _run_one(
    key: str,
    job: AdapterJob,
    members: list[EncodedTask],
    training: TrainingConfig,
    gpus: float,
    folder: Path,
    model: dict[str, Any],
) -> None:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", _START_TIMEOUT_S)
    if job.start is not None:
        model = {**model, "initial_adapter": str(job.start.folder)}
    resources: dict[str, float] = {"CPU": training.cpus}
    if gpus:
        resources["GPU"] = gpus
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "key": key,
            "job": job,
            "tasks": members,
            "training": training,
            "folder": str(folder),
            "model": model,
        },
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=training.workers, use_gpu=bool(gpus), resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=key,
            storage_path=str((folder / "checkpoints").resolve()),
            failure_config=ray.train.FailureConfig(max_failures=training.max_failures, controller_failure_limit=3),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    trainer.fit()
    shutil.rmtree(folder / "checkpoints" / key, ignore_errors=True)


def _watch(wanted: dict[str, AdapterJob], folder: Path, bar: Bar, stop: threading.Event) -> None:
    """Turn the workers' logs into progress."""
    seen = 0
    while True:
        ended = stop.wait(1.0)
        steps, notes = 0, []
        for key, job in wanted.items():
            log = folder / "checkpoints" / key / "train.jsonl"
            if (folder / "trained" / key / "result.json").exists():
                steps += job.steps
                continue
            if not log.exists():
                continue
            last = read_row((log.read_text().splitlines() or [""])[-1])
            if last is not None:
                steps += int(last["step"]) + 1
                notes.append(f"{job.name} loss {last['loss']:.2f}")
        if steps > seen:
            bar.advance(steps - seen, ", ".join(notes))
            seen = steps
        if ended:
            return


def _reason(error: BaseException) -> str:
    cause = getattr(error, "worker_failures", None)
    if isinstance(cause, dict) and cause:
        error = next(iter(cause.values()))
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"
