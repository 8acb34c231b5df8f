"""A cluster that was there before the run and stays: a driver that dies leaves nothing behind that holds its resources."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_stop_and_go_on import Driver, assert_same_end

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.slow]

FREE_S = 60  # until a dead driver's resources are back; Train's cleaner needs a few seconds, a busy machine some more
_PROBE = """
import time, ray
from ray.util import placement_group_table
ray.init(log_to_driver=False, logging_level="ERROR")
deadline = time.monotonic() + {seconds}
while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
    assert time.monotonic() < deadline, (ray.available_resources(), placement_group_table())
    time.sleep(0.5)
"""


@pytest.fixture
def standing_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A head with one CPU: what a dead driver kept of it, the next run would wait for for ever."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        Path(sys.executable).parent / "ray", "start", "--head", "--num-cpus=1", f"--port={address.rpartition(':')[2]}",
        "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--dashboard-port=0",
        f"--object-store-memory={100 * 2**20}", f"--temp-dir=/tmp/ray-standing-{os.getpid()}", "--block",
    ]  # fmt: skip
    with (tmp_path / "head.txt").open("w") as log:
        head = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    monkeypatch.setenv("RAY_ADDRESS", address)
    try:
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in (tmp_path / "head.txt").read_text():
            assert head.poll() is None, (tmp_path / "head.txt").read_text()
            assert time.monotonic() < deadline, (tmp_path / "head.txt").read_text()
            time.sleep(0.5)
        yield address
    finally:
        head.terminate()
        head.wait(60)


def test_a_dead_driver_gives_its_resources_back(whole_job, finished_run, standing_cluster, tmp_path):
    output = tmp_path / "run"
    moments = {
        "a part of the gradients": lambda: any((output / "gradients" / ".parts").glob("*.npz")),
        "the search": lambda: (output / "affinity.json").exists() and not (output / "partition.json").exists(),
        "a checkpoint": lambda: any((output / "checkpoints").glob("*/step-*")),
    }
    for what, reached in moments.items():
        driver = Driver(whole_job, output)
        driver.wait_for(what, reached)
        driver.kill()
        subprocess.run([sys.executable, "-c", _PROBE.format(seconds=FREE_S)], check=True, timeout=FREE_S + 120)
    Driver(whole_job, output).finish()
    assert_same_end(output, finished_run)
