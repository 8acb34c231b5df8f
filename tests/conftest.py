"""A tiny model and tasks for the session, and one Ray cluster for all tests that run in this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import OPTIONS, write_job, write_model, write_task

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small problems gain nothing from threads, and threads that wait for each other lose much on a busy machine."""
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    with threadpool_limits(limits=1):
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four tasks: two that agree, one that asks the opposite in the same words, one with four multi-token labels."""
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder / "films", seed=1)
    write_task(folder / "phones", seed=2)
    write_task(folder / "contrary", flip=True, seed=3)
    write_task(folder / "options", OPTIONS, seed=4)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `-n 2`: all files that start Ray go to one process, which has one cluster; the others go file by file."""
    from xdist.scheduler import LoadFileScheduling

    class OneCluster(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ray" if "pytest.mark.ray" in (config.rootpath / file).read_text() else file

    return OneCluster(config, log)


@pytest.fixture
def obeys_ctrl_c() -> Iterator[None]:
    """SIGINT as at a terminal, for this process and what it starts: in a shell's background it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray cluster of this machine for all tests that run in this process."""
    from ray_ensemble.runtime import ray_session

    with ray_session():
        yield


@pytest.fixture(scope="module")
def wide_cluster(ray_cluster: None) -> Iterator[None]:
    """The same cluster with a second node, since sharded replicas want more CPUs than this machine may have."""
    import ray

    before = len(ray.nodes())
    command = [
        Path(sys.executable).parent / "ray", "start", "--address", ray.get_runtime_context().gcs_address,
        "--num-cpus=4", f"--object-store-memory={100 * 2**20}", "--block",
    ]  # fmt: skip
    node = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while sum(found["Alive"] for found in ray.nodes()) <= before:
            assert node.poll() is None, "the second node did not start"
            assert time.monotonic() < deadline, "the second node did not join"
            time.sleep(0.2)
        yield
    finally:
        node.terminate()
        node.wait(30)


@pytest.fixture(scope="session")
def whole_job(tiny_model: Path, task_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job file of four tasks, one of them with four labels that share their first token."""
    return write_job(tmp_path_factory.mktemp("whole"), tiny_model, task_folder)


@pytest.fixture(scope="session")
def finished_run(ray_cluster: None, whole_job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That job, run undisturbed by the library in this process."""
    from ray_ensemble import Job

    return Job.from_yaml(whole_job).run(tmp_path_factory.mktemp("finished") / "run").folder
