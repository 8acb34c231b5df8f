"""Trained adapters by what they depend on, so that validation, baselines and later searches never train the same thing twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ray_ensemble.config import JobConfig, TrainingConfig
from ray_ensemble.files import read_json, sha256_file, sha256_json
from ray_ensemble.tasks import EncodedTask, split_hash

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# Settings that the key of a trained adapter always holds, and those that say how and for how long, not what.
_HASHED = frozenset(
    ("batch_size", "learning_rate", "warmup", "schedule", "weight_decay", "max_grad_norm", "strategy", "threads")
)
_NOT_HASHED = frozenset(
    (
        "concurrency", "min_steps", "epochs", "cpus", "gpus", "max_failures", "checkpoint_every", "seed", "pack",
        "batch_tokens", "activation_checkpointing", "max_preemptions", "loggers", "workers", "offload", "wait_minutes",
    )
)  # fmt: skip


@dataclass(frozen=True)
class StartingPoint:
    """An adapter that training starts from: its folder, as `storage.located` tells workers of it, and the hash of its weights."""

    folder: Path | str
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
    validation_tokens: int
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
        result.get("validation_tokens", 0),
        result["seconds"],
        result["peak_memory_bytes"],
        result["final_loss"],
    )
