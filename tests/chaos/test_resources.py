"""What a job asks of a cluster, where its parts sit, and that it gives everything back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from harness import Nodes, assert_undisturbed, copy_before, driver_on, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(1800)]

SPOT = {"RAY_NODE_MARKET_TYPE": "spot"}
# What may sit on a node that is taken away: it is work, and is done again elsewhere. Ray restarts the watcher by itself.
WORK = {
    "GradientReplica",
    "ScoringReplica",
    "RayTrainWorker",
    "with_resources.<locals>.ResourceTrainable",
    "PreemptionWatcher",
}
COORDINATORS = {"TrainController", "SynchronizationActor", "PlacementGroupCleaner", "DatasetManager", "_Shared"}


def test_coordinators_sit_with_the_driver_and_never_on_spot_nodes(reference, tmp_path):
    output = copy_before("search", reference, tmp_path / "run")
    with Nodes(worker_environment=SPOT) as nodes:
        with driver_on(nodes, reference.job, output, "train") as driver:
            driver.finish()
        actors, found = nodes.ask("actors"), nodes.ask("nodes")  # the dead ones too
    head = next(node["id"] for node in found if node["labels"].get("ray.io/market-type") != "spot")
    assert len(found) == 3
    assert {actor["class"] for actor in actors} >= COORDINATORS | {"RayTrainWorker"}
    assert {actor["class"] for actor in actors if actor["node"] != head} <= WORK
    assert_undisturbed(output, reference, "train")


def test_a_driver_on_a_spot_node_is_refused(reference, tmp_path):
    output = copy_before("search", reference, tmp_path / "run")
    with Nodes(workers=0, environment=SPOT) as nodes, driver_on(nodes, reference.job, output, "search") as driver:
        assert driver.process.wait(120) == 2
    assert "on a spot node (ray.io/market-type=spot)" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("mode", ["worker", "controller", "backend", "search"])
def test_what_dies_gives_its_resources_back_while_the_driver_lives(reference, mode, tmp_path):
    """On a cluster without a dashboard, where Ray's own clean-up sees nothing; in it, the same call ends well afterwards."""
    stage = "search" if mode == "search" else "train"
    output = copy_before(stage, reference, tmp_path / "run")
    with Nodes(workers=0, dashboard=False) as nodes:
        nodes.add("--num-gpus=1")
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("leaks.py")), str(reference.job), str(output), mode],
            env=nodes.environment(), capture_output=True, text=True, timeout=1200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        told = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"told"')))
        assert nodes.ask("free", 60) == []
    reason = {
        "worker": "adapters could not be trained",
        "controller": "ActorDied",
        "backend": "NCCL",
        "search": "search",
    }
    assert reason[mode] in told["told"], told
    assert told["free"], told
    assert told["again"] == "", told
    assert_undisturbed(
        output, reference, "search"
    )  # adapters of a pack are not those of jobs of their own to the last bit


def test_more_than_the_cluster_can_give_ends_with_what_it_lacks(reference, tmp_path):
    """A head without CPUs and no workers: every stage tells so after its `wait_minutes` (here 12 s)."""
    wanted = {
        "gradients": "the cluster placed no actor in 0.2 minutes (gradients.wait_minutes): 1 × 1 CPUs and 0 GPUs asked for",
        "search": "the cluster placed no trial in 0.2 minutes (search.wait_minutes): 1 × 1 CPUs and 0 GPUs asked for",
        "train": "no worker could start in training.wait_minutes: 1 × 1 CPUs and 0 GPUs asked for",
    }
    changes = [f"{section}.wait_minutes=0.2" for section in ("gradients", "search", "training")]
    with Nodes(workers=0) as nodes:
        for stage, told in wanted.items():
            output = copy_before(stage, reference, tmp_path / stage / "run")
            with driver_on(nodes, reference.job, output, stage, *changes) as driver:
                assert driver.process.wait(240) == 1
            log = (output.parent / "log.txt").read_text()
            assert told in log, log
            assert "the cluster has 1 nodes with 0 CPUs" in log
            assert "Traceback" not in log
        assert nodes.ask("groups") == []


def test_the_cluster_grows_with_the_work_and_shrinks_when_it_is_done(reference, tmp_path):
    """No worker before, two at the height of the work, none afterwards; no worker can hold what is refused."""
    output = tmp_path / "run"
    with Nodes(workers=0, autoscaled=True) as nodes:
        assert nodes.alive() == 1
        seen = {1}
        with driver_on(nodes, reference.job, output) as driver:
            while driver.process.poll() is None:
                seen.add(nodes.alive())
            driver.finish()
        assert max(seen) == 3
        wait_until("cluster without workers", lambda: nodes.alive() == 1, 120)
        assert_undisturbed(output, reference)
        large = copy_before("train", reference, tmp_path / "large" / "run")
        with driver_on(nodes, reference.job, large, "train", "training.cpus=4", "training.wait_minutes=0.5") as driver:
            assert driver.process.wait(300) == 1
        log = (large.parent / "log.txt").read_text()
        assert "4 CPUs" in log, log
        assert "Traceback" not in log
