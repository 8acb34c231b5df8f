"""A job of which something dies in a way that leaks, in a driver that lives on; run by test_resources.py.

    python leaks.py JOB FOLDER worker|controller|backend|search

Prints as JSON how the job ended, whether all was free again within half a minute, and how the same call ended then.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

FREE_S = 30.0
# One Ray Train run of all adapters, that gives up at once.
ONE = ["training.pack=8", "training.concurrency=1", "training.max_failures=0", "training.wait_minutes=4"]


def kill_when_begun(name: str, begun) -> None:
    """SIGKILL the actor of this class once the moment has come."""
    import ray

    while not begun():
        time.sleep(0.05)
    for actor in ray._private.state.actors().values():
        if actor["ActorClassName"] == name and actor["State"] == "ALIVE":
            os.kill(int(actor["Pid"]), signal.SIGKILL)


def free() -> bool:
    """Whether nothing is held of the cluster."""
    import ray

    now, whole = ray.available_resources(), ray.cluster_resources()
    return all(now.get(key) == whole[key] for key in ("CPU", "GPU") if key in whole)


def attempt(job: Path, folder: Path, stage: str, settings: list[str]) -> str:
    """Run a stage; returns what it failed with, or nothing."""
    from ray_ensemble import Job, RunError

    try:
        Job.from_yaml(job, settings).through(stage, folder)
    except RunError as error:
        return str(error)
    return ""


def main(job: Path, folder: Path, mode: str) -> None:
    from ray_ensemble.runtime import prepare_environment

    prepare_environment()
    import ray

    variables = {key: value for key, value in os.environ.items() if key.startswith("RAY_TRAIN_")}
    ray.init(log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": variables})
    stage, settings = ("search", []) if mode == "search" else ("train", list(ONE))
    # The node has a GPU in name only: NCCL cannot start.
    settings.append(f"training.gpus={int(mode == 'backend')}")
    killed = {
        "worker": ("RayTrainWorker", lambda: any(folder.glob("checkpoints/*/step-*"))),
        "controller": ("TrainController", lambda: any(folder.glob("checkpoints/*/step-*"))),
        "search": ("_Shared", lambda: any(path.stat().st_size for path in folder.glob("search/tune/*/result.json"))),
    }.get(mode)
    if killed is not None:
        threading.Thread(target=kill_when_begun, args=killed, daemon=True).start()
    told = attempt(job, folder, stage, settings)
    ended = time.monotonic()
    while not free() and time.monotonic() - ended < FREE_S:
        time.sleep(0.2)
    was_free = free()
    again = attempt(job, folder, stage, ["training.pack=8", "training.gpus=0"])
    print(json.dumps({"told": told, "free": was_free, "again": again}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
