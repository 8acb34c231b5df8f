"""Collect gradients on a cluster of two worker nodes and take one away in the middle; run by test_replicas.py."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path


def main(source: Path, folder: Path) -> None:
    from ray_ensemble.runtime import prepare_environment

    prepare_environment()
    import ray
    from ray.cluster_utils import Cluster

    from ray_ensemble.config import GradientsConfig, LimitsConfig, TaskConfig
    from ray_ensemble.gradients import ReplicaSpec, collect_gradients
    from ray_ensemble.models import load_tokenizer
    from ray_ensemble.tasks import encode_task, load_tasks

    memory = 100 * 2**20
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": memory})
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=memory) for _ in range(2)]
    ray.init(
        address=cluster.address,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}},
    )
    tasks = load_tasks([TaskConfig(source=str(source / "tasks"))], LimitsConfig(), source)
    tokenizer = load_tokenizer(source / "model")
    encoded = [encode_task(task, tokenizer, 64, False) for task in tasks]
    spec = ReplicaSpec(str(source / "model"), "none", str(source / "init"), 0)
    config = GradientsConfig(dim=64, batch_tokens=128, replicas=2)
    errors: list[BaseException] = []

    def collect() -> None:
        try:
            collect_gradients(encoded, spec, config, {"model": "tiny"}, folder)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=collect)
    thread.start()
    parts = folder / ".parts"
    while thread.is_alive() and not any(parts.glob("*.npz")):
        time.sleep(0.01)
    done = len(list(parts.glob("*.npz")))
    cluster.remove_node(nodes[0], allow_graceful=False)
    print(f"node removed with {done} units done, {'in' if thread.is_alive() else 'after'} the pass", flush=True)
    assert thread.is_alive()
    thread.join()
    if errors:
        raise errors[0]
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
