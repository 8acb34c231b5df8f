"""Lost and late messages between Ray's processes, a worker killed for its memory, a full disk, a node that stands still."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from harness import Ledger, Nodes, assert_undisturbed, copy_before, driver_on, memory_group
from hungry import BATCH_TOKENS, INTERMEDIATE, encoded_tasks, job_and_settings
from safetensors.torch import load_file
from small_disk import small_disk
from tiny import write_model

from ray_ensemble.config import AdapterConfig
from ray_ensemble.models import attach_adapters, draw_initial_adapter, load_base
from ray_ensemble.training import train_adapter

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(1800)]
CPU = torch.device("cpu")

# One message in a hundred is lost, and one answer, of all kinds that Ray sends again.
LOST = {
    "RAY_testing_rpc_failure": json.dumps({"*": {"num_failures": -1, "req_failure_prob": 1, "resp_failure_prob": 1}})
}
MANY_TRIES = "training.max_failures=30"  # Ray Train takes a worker that one message did not reach for lost
# Messages that carry our work, each by up to 0.3 s. Where all steps of Ray's event loops are late ("*") they change places, and
# Ray's own processes die of that.
LATE_MESSAGES = (
    "CoreWorkerService.grpc_server.PushTask",
    "CoreWorkerService.grpc_server.GetObjectStatus",
    "NodeManagerService.grpc_server.RequestWorkerLease",
    "NodeManagerService.grpc_server.ReturnWorkerLease",
    "NodeManagerService.grpc_server.PrepareBundleResources",
    "NodeManagerService.grpc_server.CommitBundleResources",
    "ObjectManagerService.grpc_server.Pull",
    "ObjectManagerService.grpc_server.Push",
    "ActorInfoGcsService.grpc_server.RegisterActor",
    "ActorInfoGcsService.grpc_server.CreateActor",
    "PlacementGroupInfoGcsService.grpc_server.CreatePlacementGroup",
    "PlacementGroupInfoGcsService.grpc_server.RemovePlacementGroup",
)
LATE = {"RAY_testing_asio_delay_us": ",".join(f"{message}=0:300000" for message in LATE_MESSAGES)}
STANDS_STILL_S = 20.0


@pytest.mark.parametrize("environment", [LOST, LATE], ids=["lost", "late"])
def test_messages_between_rays_processes_are_lost_or_late(reference, environment, tmp_path):
    output = tmp_path / "run"
    with (
        Ledger(output) as ledger,
        Nodes(environment=environment) as nodes,
        driver_on(nodes, reference.job, output, "run", MANY_TRIES) as driver,
    ):
        driver.finish()
    ledger.assert_nothing_twice(unregistered=3)  # the answer that told Ray Train of a checkpoint may be lost, too
    assert_undisturbed(output, reference)


@pytest.mark.parametrize("stage", ["gradients", "train"])
def test_a_node_stands_still(reference, stage, tmp_path):
    """Not long enough for Ray to give it up: what it had in hand comes later."""
    output = copy_before(stage, reference, tmp_path / "run")
    with Ledger(output) as ledger, Nodes() as nodes, driver_on(nodes, reference.job, output, stage) as driver:
        part = {"gradients": "gradients/.parts/*.npz", "train": "checkpoints/*/step-*"}[stage]
        driver.wait_for("part of the stage", lambda: any(output.glob(part)))
        nodes.workers[0].signal(signal.SIGSTOP)
        time.sleep(STANDS_STILL_S)
        nodes.workers[0].signal(signal.SIGCONT)
        driver.finish()
    ledger.assert_nothing_twice()
    assert_undisturbed(output, reference, stage)


@pytest.fixture
def hungry_source(task_folder: Path, tmp_path: Path) -> Path:
    source = tmp_path / "source"
    write_model(source / "model", intermediate=INTERMEDIATE)
    shutil.copytree(task_folder, source / "tasks")
    draw_initial_adapter(load_base(source / "model", "none", CPU), AdapterConfig(), source / "init")
    return source


def test_a_worker_that_ray_kills_for_its_memory_goes_on_with_smaller_micro_batches(hungry_source, tmp_path):
    """The node's processes are in a control group of 5 GiB, of which Ray lets them use half; a whole micro-batch needs 3 GiB."""
    monitored = {"RAY_memory_usage_threshold": "0.5", "RAY_memory_monitor_refresh_ms": "50"}
    with memory_group(5 * 2**30) as inside, Nodes(workers=0) as nodes:
        nodes.add(environment=monitored, prefix=inside)
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("hungry.py")), str(hungry_source), str(tmp_path / "run")],
            env=nodes.environment(), capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"adapter"')))
    assert told["kills"] == 1, done.stdout

    job, settings = job_and_settings()
    members = [task for task in encoded_tasks(hungry_source) if task.name in job.members]
    model = load_base(hungry_source / "model", "none", CPU)
    model = attach_adapters(model, {"default": hungry_source / "init"}, trainable="default")
    smaller = settings.model_copy(update={"batch_tokens": BATCH_TOKENS // 2})
    train_adapter(model, members, smaller, job.steps, job.seed, 0)
    found = load_file(Path(told["adapter"]) / "adapter_model.safetensors")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            # A step moves by up to 5e-3; Adam divides by what may be little more than rounding.
            torch.testing.assert_close(found[name.replace(".default.", ".")], parameter.detach(), rtol=1e-5, atol=1e-5)


@pytest.fixture
def small_output(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "run", 8) as folder:
        yield folder


@pytest.mark.parametrize("stage", ["gradients", "search", "ensemble"])
def test_a_full_disk_is_told_and_the_same_command_goes_on_once_there_is_room(reference, small_output, stage):
    """Training on a full disk: tests/training/test_jobs.py."""
    copy_before(stage, reference, small_output)
    ballast = small_output / "ballast"
    with pytest.raises(OSError, match="No space"):
        ballast.write_bytes(b"x" * 2**24)
    os.truncate(ballast, ballast.stat().st_size - 2**14)  # room for the lease, and for not much else
    with Nodes() as nodes:
        with driver_on(nodes, reference.job, small_output, stage) as driver:
            assert driver.process.wait(240) == 1
        log = small_output.with_name("log.txt").read_text()
        assert "the disk is full" in log, log
        assert "Traceback" not in log
        ballast.unlink()
        with driver_on(nodes, reference.job, small_output, stage) as driver:
            driver.finish()
    assert_undisturbed(small_output, reference, stage)
