"""Trains an adapter on a base whose activations fill memory, on the cluster at RAY_ADDRESS; run by test_faults.py.

    python hungry.py SOURCE FOLDER

SOURCE holds model/, tasks/ and init/. Prints as JSON where the adapter is, and how often a worker was killed for its memory.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

STEPS, BATCH_TOKENS = 4, 160
INTERMEDIATE = 400_000  # floats of each of the MLP's activations for a token: 2 GB for BATCH_TOKENS and two layers


def job_and_settings():
    """What is trained; the test trains the same with small micro-batches from the start."""
    from ray_ensemble.config import TrainingConfig
    from ray_ensemble.training import AdapterJob

    settings = TrainingConfig(
        batch_size=16, learning_rate=5e-3, checkpoint_every=2, batch_tokens=BATCH_TOKENS, max_failures=1
    )
    return AdapterJob("group-0", ("films", "contrary"), STEPS, 3), settings


def encoded_tasks(source: Path):
    from ray_ensemble.config import LimitsConfig, TaskConfig
    from ray_ensemble.models import load_tokenizer
    from ray_ensemble.tasks import encode_task, load_tasks

    tokenizer = load_tokenizer(source / "model")
    loaded = load_tasks([TaskConfig(source=str(source / "tasks"))], LimitsConfig(), source)
    return [encode_task(task, tokenizer, 64) for task in loaded]


def main(source: Path, folder: Path) -> None:
    from ray_ensemble.runtime import prepare_environment, ray_session

    prepare_environment()
    from ray_ensemble.config import JobConfig, ModelConfig, TaskConfig
    from ray_ensemble.gradients import ReplicaSpec
    from ray_ensemble.training import train_adapters
    from ray_ensemble.training.pack import interruptions

    job, training = job_and_settings()
    config = JobConfig(
        model=ModelConfig(source=str(source / "model")), tasks=[TaskConfig(source="data")], training=training
    )
    spec = asdict(ReplicaSpec(str(source / "model"), "none", str(source / "init"), 0))
    kills = 0

    def count() -> None:
        nonlocal kills
        while True:
            for checkpoints in folder.glob("checkpoints/*"):
                kills = max(kills, interruptions(checkpoints).count("memory"))
            time.sleep(0.1)

    threading.Thread(target=count, daemon=True).start()
    with ray_session():
        found = train_adapters([job], encoded_tasks(source), config, folder, spec, {"model": "hungry"})
    print(json.dumps({"adapter": str(found["group-0"].folder), "kills": kills}), flush=True)


if __name__ == "__main__":
    assert os.environ["RAY_ADDRESS"]
    main(Path(sys.argv[1]), Path(sys.argv[2]))
