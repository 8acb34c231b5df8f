"""Train an adapter on a cluster and interrupt it; run by test_interruptions.py.

    python interrupted.py SOURCE FOLDER worker|node|notice

SOURCE holds model/, tasks/ and init/. Prints as JSON the newest checkpoint's step when training was interrupted, and the smallest
step that the log ended with afterwards, which is where it went on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

STEPS = {"worker": 60, "node": 60, "notice": 1500}
EVERY = {"worker": 5, "node": 5, "notice": 100_000}  # steps between checkpoints
# (failures, pre-emptions) that a job survives: a notice must not use up the first, nor a failure the second.
BUDGETS = {"worker": (1, 0), "node": (1, 0), "notice": (0, 1)}


def job_and_settings(mode):
    """What is trained; the test trains the same undisturbed."""
    from ray_ensemble.config import TrainingConfig
    from ray_ensemble.training import AdapterJob

    failures, preemptions = BUDGETS[mode]
    settings = TrainingConfig(
        batch_size=4,
        learning_rate=5e-3,
        checkpoint_every=EVERY[mode],
        max_failures=failures,
        max_preemptions=preemptions,
    )
    return AdapterJob("group-0", ("films", "contrary"), STEPS[mode], 3), settings


def encoded_tasks(source: Path):
    from ray_ensemble.config import LimitsConfig, TaskConfig
    from ray_ensemble.models import load_tokenizer
    from ray_ensemble.tasks import encode_task, load_tasks

    tokenizer = load_tokenizer(source / "model")
    loaded = load_tasks([TaskConfig(source=str(source / "tasks"))], LimitsConfig(), source)
    return [encode_task(task, tokenizer, 64) for task in loaded]


def training_worker() -> int:
    """The process that trains, among this script's descendants."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                titles[int(entry.name)] = (entry / "cmdline").read_text()
            except (OSError, IndexError, ValueError):
                continue
    for pid, title in titles.items():
        above = pid
        while above in parents and above != os.getpid():
            above = parents[above]
        if above == os.getpid() and title.startswith("ray::RayTrainWorker"):
            return pid
    raise AssertionError("no training worker runs")


def last_step(log: Path) -> int:
    """Step of the log's last whole row; −1 where there is none."""
    try:
        return int(json.loads(log.read_text().rpartition("\n")[0].rpartition("\n")[2])["step"])
    except (OSError, ValueError):
        return -1


def main(source: Path, folder: Path, mode: str) -> None:  # noqa: PLR0915
    os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "0.5"
    from ray_ensemble.runtime import prepare_environment

    prepare_environment()
    import ray
    from ray.cluster_utils import Cluster

    from ray_ensemble.config import JobConfig, ModelConfig, TaskConfig
    from ray_ensemble.gradients import ReplicaSpec
    from ray_ensemble.training import train_adapters

    memory = 100 * 2**20
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": memory})
    node = cluster.add_node(num_cpus=1, object_store_memory=memory)
    handed_on = (
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S",
        "RAY_TRAIN_METRICS_ENABLED",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S",
    )
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), **{key: os.environ[key] for key in handed_on}}
    ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": environment})
    job, training = job_and_settings(mode)
    config = JobConfig(
        model=ModelConfig(source=str(source / "model")), tasks=[TaskConfig(source="data")], training=training
    )
    spec = asdict(ReplicaSpec(str(source / "model"), "none", str(source / "init"), 0))
    tasks, errors, found = encoded_tasks(source), [], {}

    def train() -> None:
        try:
            found.update(train_adapters([job], tasks, config, folder, spec, {"model": "tiny"}))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()

    def wait_for(what: str, condition) -> None:
        deadline = time.monotonic() + 240
        while not condition():
            assert thread.is_alive(), f"training ended before {what}: {errors}"
            assert time.monotonic() < deadline, f"no {what}"
            time.sleep(0.01)

    def log() -> Path:
        return next(iter(folder.glob("checkpoints/*/logs/*.jsonl")), folder / "none")

    def checkpoints() -> int:
        return max((int(p.name.removeprefix("step-")) for p in folder.glob("checkpoints/*/step-*")), default=0)

    at: int
    if mode == "worker":
        wait_for("third checkpoint", lambda: checkpoints() >= 3 * EVERY[mode])
        at = checkpoints()
        os.kill(training_worker(), signal.SIGKILL)
    elif mode == "node":
        wait_for("third checkpoint", lambda: checkpoints() >= 3 * EVERY[mode])
        at = checkpoints()
        cluster.add_node(num_cpus=1, object_store_memory=memory)
        cluster.remove_node(node, allow_graceful=False)
    else:
        wait_for("step", lambda: last_step(log()) >= 20)
        cluster.add_node(num_cpus=1, object_store_memory=memory)
        identity = next(
            n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeManagerPort"] == node.node_manager_port
        )
        subprocess.run(
            [Path(sys.executable).parent / "ray", "drain-node", "--address", cluster.address, "--node-id", identity,
             "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot node", "--deadline-remaining-seconds", "8"],
            check=True, capture_output=True,
        )  # fmt: skip
        notice_over = time.monotonic() + 8
        wait_for("checkpoint at the notice", lambda: checkpoints() > 0)
        at = checkpoints()
        # The notice leaves time; the cloud takes the node when it is over.
        wait_for("end of the notice", lambda: time.monotonic() > notice_over)
        cluster.remove_node(node, allow_graceful=False)
    smallest = STEPS[mode]
    while thread.is_alive():
        step = last_step(log())
        if 0 <= step < STEPS[mode] - 1:
            smallest = min(smallest, step)
        time.sleep(0.005)
    thread.join()
    if errors:
        raise errors[0]
    print(json.dumps({"interrupted": at, "went_on": smallest, "adapter": str(found["group-0"].folder)}), flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
