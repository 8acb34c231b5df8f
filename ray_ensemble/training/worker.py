"""What runs on a Ray Train worker: load, resume, train, report checkpoints, leave the adapter in the run folder."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from ray_ensemble.config import TrainingConfig
from ray_ensemble.files import jsonl_appender, read_json, sha256_file, whole_folder, write_json
from ray_ensemble.runtime import peak_memory_bytes
from ray_ensemble.training.cache import ADAPTER_FILES, AdapterJob
from ray_ensemble.training.learner import TrainingState


def train_worker(settings: dict[str, Any]) -> None:
    """What runs on a Ray Train worker: load, resume, train, report checkpoints, leave the adapter in the run folder."""
    import ray.train
    import torch

    from ray_ensemble.models import (
        default_device,
        materialise,
        quiet_libraries,
    )
    from ray_ensemble.training.loop import train_adapter
    from ray_ensemble.training.parallel import make_workers

    job: AdapterJob = settings["job"]
    training: TrainingConfig = settings["training"]
    folder, key, source = Path(settings["folder"]), settings["key"], settings["model"]
    quiet_libraries()
    torch.set_num_threads(training.threads)
    started = time.monotonic()
    device = default_device()
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())  # Ray Train has chosen this worker's
    workers = make_workers(training)
    leads = workers.rank == 0
    initial = Path(source["initial_adapter"])
    model = workers.load(materialise(source["source"]), source["quantization"], initial, device)
    log = folder / "checkpoints" / key / "train.jsonl"

    def on_checkpoint(step: int, save: Any) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            save(Path(temporary))
            ray.train.report(
                {"step": step},
                checkpoint=ray.train.Checkpoint.from_directory(temporary) if leads else None,
                checkpoint_dir_name=f"step-{step:06d}",
            )

    append = jsonl_appender(log) if leads else lambda row: None
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        if leads:
            log.unlink(missing_ok=True)
        state = train_adapter(
            model, settings["tasks"], training, job.steps, job.seed, source["pad_id"],
            workers=workers, on_step=append, on_checkpoint=on_checkpoint,
        )  # fmt: skip
    else:
        with checkpoint.as_directory() as resume:
            if leads:
                _cut_log(log, Path(resume))
            state = train_adapter(
                model, settings["tasks"], training, job.steps, job.seed, source["pad_id"],
                workers=workers, resume=Path(resume), on_step=append, on_checkpoint=on_checkpoint,
            )  # fmt: skip
    peak = workers.most(peak_memory_bytes(), device)
    with workers.whole_adapter(model):
        if leads:
            _leave(model, settings, state, peak, time.monotonic() - started)


def _leave(model: Any, settings: dict[str, Any], state: TrainingState, peak: int, seconds: float) -> None:
    """Leave the adapter, its log and its record in the run folder."""
    from ray_ensemble.models import save_adapter

    job: AdapterJob = settings["job"]
    folder, key = Path(settings["folder"]), settings["key"]
    log = folder / "checkpoints" / key / "train.jsonl"
    rows = [read for line in log.read_text().splitlines() if (read := read_row(line)) is not None]
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
                "seconds": seconds,
                "peak_memory_bytes": peak,
                "files": {name: sha256_file(temporary_folder / name) for name in ADAPTER_FILES},
            },
        )


def read_row(line: str) -> dict[str, Any] | None:
    """A row of `train.jsonl`, or None where a kill cut it off."""
    try:
        row: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None  # the last line of a killed worker
    return row


def _cut_log(log: Path, checkpoint: Path) -> None:
    """Drop the log's rows after the checkpoint; they are about to be made again."""
    step = read_json(checkpoint / "state.json", "checkpoint")["step"]
    lines = log.read_text().splitlines() if log.exists() else []
    kept = [line for line in lines if (row := read_row(line)) is not None and row["step"] < step]
    log.write_text("".join(f"{line}\n" for line in kept))
