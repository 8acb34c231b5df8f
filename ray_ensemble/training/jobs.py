"""Adapters as Ray Train jobs: every group is one `TorchTrainer`, as many at once as resources and `concurrency` allow."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_ensemble.config import JobConfig, TrainingConfig
from ray_ensemble.errors import InputError, RunError
from ray_ensemble.files import jsonl_appender, read_json, sha256_file, sha256_json, whole_folder, write_json
from ray_ensemble.progress import Bar
from ray_ensemble.runtime import cluster_cpus, cluster_gpus, peak_memory_bytes
from ray_ensemble.tasks import EncodedTask, split_hash

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_START_TIMEOUT_S = "300"
# Settings that the key of a trained adapter always holds, and those that say how and for how long, not what.
_HASHED = frozenset(
    ("batch_size", "learning_rate", "warmup", "schedule", "weight_decay", "max_grad_norm", "strategy", "threads")
)
_NOT_HASHED = frozenset(
    (
        "concurrency", "min_steps", "epochs", "cpus", "gpus", "max_failures", "checkpoint_every", "seed", "pack",
        "batch_tokens", "activation_checkpointing",
    )
)  # fmt: skip


@dataclass(frozen=True)
class StartingPoint:
    """An adapter that training starts from: its folder and the hash of its weights."""

    folder: Path
    hash: str


@dataclass(frozen=True)
class AdapterJob:
    """One adapter to train: its name in this run, the tasks it learns, its budget, and where it starts if not where all do."""

    name: str
    members: tuple[str, ...]
    steps: int
    seed: int
    start: StartingPoint | None = None


@dataclass(frozen=True)
class TrainedAdapter:
    """A finished adapter: its folder, its cache key, and what it cost."""

    folder: Path
    key: str
    steps: int
    tokens: int
    seconds: float
    peak_memory_bytes: int
    final_loss: float


def job_key(job: AdapterJob, tasks: Sequence[EncodedTask], config: JobConfig, base: dict[str, str]) -> str:
    """What a trained adapter depends on, hashed: members and their data, seed, budget, settings, base and θ₀.

    Names of groups are left out, so that validation, baselines and later searches never train the same thing twice.
    """
    settings = {
        key: value
        for key, value in config.training.model_dump(mode="json").items()
        # `steps` and `seed` of the job stand for the config's. A key that came later counts once it is set, so that what
        # was trained before there was such a key is still found.
        if key in _HASHED or (key not in _NOT_HASHED and value != TrainingConfig.model_fields[key].default)
    }
    # In the job's order, which is the order that the sampler counts in.
    data = [[task.name, split_hash(task, task["train"])] for task in tasks if task.name in job.members]
    if job.start is not None:
        base = {**base, "adapter": job.start.hash}
    content = {"data": data, "steps": job.steps, "seed": job.seed, "training": settings, "base": base}
    if config.training.early_stop is not None:
        content["validation"] = [split_hash(task, task["validation"]) for task in tasks if task.name in job.members]
    return sha256_json(content)[:20]


def finished(folder: Path, key: str) -> TrainedAdapter | None:
    """The cached adapter of this key, or None. A damaged one is treated as absent after being named."""
    target = folder / "trained" / key
    if not (target / "result.json").is_file():
        return None
    result = read_json(target / "result.json", "record of a trained adapter")
    for name, digest in result["files"].items():
        if not (target / name).is_file() or sha256_file(target / name) != digest:
            print(f"{target / name}: damaged; this adapter is trained again", flush=True)
            return None
    return TrainedAdapter(
        target,
        key,
        result["steps"],
        result["tokens"],
        result["seconds"],
        result["peak_memory_bytes"],
        result["final_loss"],
    )


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
    if training.cpus > cluster_cpus() or gpus > cluster_gpus():
        raise InputError(
            f"training asks for {training.cpus:g} CPUs and {gpus:g} GPUs a job, the cluster has {cluster_cpus()} CPUs "
            f"and {cluster_gpus()} GPUs: lower training.cpus or training.gpus"
        )
    # A job that waits for resources costs a controller process that polls, so no more are submitted than fit.
    fitting = int(min(cluster_cpus() / training.cpus, cluster_gpus() / gpus if gpus else float("inf")))
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
        _train_worker,
        train_loop_config={
            "key": key,
            "job": job,
            "tasks": members,
            "training": training,
            "folder": str(folder),
            "model": model,
        },
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=1, use_gpu=bool(gpus), resources_per_worker=resources),
        run_config=ray.train.RunConfig(
            name=key,
            storage_path=str((folder / "checkpoints").resolve()),
            failure_config=ray.train.FailureConfig(max_failures=training.max_failures, controller_failure_limit=3),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    trainer.fit()
    shutil.rmtree(folder / "checkpoints" / key, ignore_errors=True)


def _train_worker(settings: dict[str, Any]) -> None:
    """What runs on a Ray Train worker: load, resume, train, report checkpoints, leave the adapter in the run folder."""
    import ray.train
    import torch

    from ray_ensemble.models import (
        attach_adapters,
        default_device,
        load_base,
        materialise,
        quiet_libraries,
        save_adapter,
    )
    from ray_ensemble.training.loop import train_adapter

    job: AdapterJob = settings["job"]
    training: TrainingConfig = settings["training"]
    folder, key, source = Path(settings["folder"]), settings["key"], settings["model"]
    quiet_libraries()
    torch.set_num_threads(training.threads)
    started = time.monotonic()
    model = attach_adapters(
        load_base(materialise(source["source"]), source["quantization"], default_device()),
        {"default": Path(source["initial_adapter"])},
        trainable="default",
    )
    log = folder / "checkpoints" / key / "train.jsonl"

    def on_checkpoint(step: int, save: Any) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            save(Path(temporary))
            ray.train.report(
                {"step": step},
                checkpoint=ray.train.Checkpoint.from_directory(temporary),
                checkpoint_dir_name=f"step-{step:06d}",
            )

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        log.unlink(missing_ok=True)
        state = train_adapter(
            model, settings["tasks"], training, job.steps, job.seed, source["pad_id"],
            on_step=jsonl_appender(log), on_checkpoint=on_checkpoint,
        )  # fmt: skip
    else:
        with checkpoint.as_directory() as resume:
            _cut_log(log, Path(resume))
            state = train_adapter(
                model, settings["tasks"], training, job.steps, job.seed, source["pad_id"],
                resume=Path(resume), on_step=jsonl_appender(log), on_checkpoint=on_checkpoint,
            )  # fmt: skip
    rows = [read for line in log.read_text().splitlines() if (read := _row(line)) is not None]
    tail = [row["loss"] for row in rows[-20:]]
    with whole_folder(folder / "trained" / key) as temporary_folder:
        save_adapter(model, temporary_folder, "default")
        shutil.copy(log, temporary_folder / "train.jsonl")
        write_json(
            temporary_folder / "result.json",
            {
                "members": list(job.members),
                "seed": job.seed,
                "steps": state.step,
                "tokens": state.tokens,
                "final_loss": sum(tail) / len(tail),
                "seconds": time.monotonic() - started,
                "peak_memory_bytes": peak_memory_bytes(),
                "files": {name: sha256_file(temporary_folder / name) for name in _ADAPTER_FILES},
            },
        )


def _row(line: str) -> dict[str, Any] | None:
    try:
        row: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None  # the last line of a killed worker
    return row


def _cut_log(log: Path, checkpoint: Path) -> None:
    """Drop the log's rows after the checkpoint; they are about to be made again."""
    step = read_json(checkpoint / "state.json", "checkpoint")["step"]
    lines = log.read_text().splitlines() if log.exists() else []
    kept = [line for line in lines if (row := _row(line)) is not None and row["step"] < step]
    log.write_text("".join(f"{line}\n" for line in kept))


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
            last = _row((log.read_text().splitlines() or [""])[-1])
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
