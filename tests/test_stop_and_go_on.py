"""Kill the run anywhere: the same command goes on and ends with the same partition and metrics."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

TIMEOUT = 540.0


class Driver:
    """A `ray-ensemble run`, or another verb, in a process of its own."""

    def __init__(
        self,
        job: Path,
        output: Path,
        verb: str = "run",
        changes: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.output = output
        self.log = (output.parent / "log.txt").open("a")
        settings = [part for change in changes for part in ("--set", change)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ray_ensemble.cli", verb, str(job), "--output", str(output), *settings],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=environment,
        )

    def wait_for(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert self.process.poll() is None, f"ended before {what}: {(self.output.parent / 'log.txt').read_text()}"
            assert time.monotonic() < deadline, f"no {what} in {TIMEOUT} s"
            time.sleep(0.02)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def finish(self) -> None:
        assert self.process.wait(TIMEOUT) == 0, (self.output.parent / "log.txt").read_text()


def children_of(pid: int) -> list[int]:
    """All living descendants of a process."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError, ValueError):
                continue
    found, todo = [], [pid]
    while todo:
        parent = todo.pop()
        children = [child for child, p in parents.items() if p == parent]
        found += children
        todo += children
    return found


def kill_worker(driver: Driver, title: str) -> bool:
    """SIGKILL one process of the driver's cluster whose title begins so; False if there is none."""
    for pid in children_of(driver.process.pid):
        try:
            if Path(f"/proc/{pid}/cmdline").read_text().startswith(title):
                os.kill(pid, signal.SIGKILL)
                return True
        except OSError:
            continue
    return False


def assert_same_end(output: Path, undisturbed: Path) -> None:
    assert (output / "partition.json").read_bytes() == (undisturbed / "partition.json").read_bytes()
    ours, theirs = (json.loads((o / "metrics.json").read_text()) for o in (output, undisturbed))
    for task, models in theirs["tasks"].items():
        for model, metric in models.items():
            assert ours["tasks"][task][model]["loss"] == pytest.approx(metric["loss"], abs=1e-6), (task, model)
            assert ours["tasks"][task][model]["accuracy"] == metric["accuracy"]
    for file in (undisturbed / "gradients").rglob("*.npy"):
        assert (output / file.relative_to(undisturbed)).read_bytes() == file.read_bytes(), file


@pytest.mark.slow
def test_driver_killed_in_gradients_search_and_training(whole_job, finished_run, tmp_path):
    output = tmp_path / "run"
    parts = output / "gradients" / ".parts"
    moments = {
        "a part of the gradients": lambda: any(parts.glob("*.npz")),
        "the search": lambda: (output / "affinity.json").exists() and not (output / "partition.json").exists(),
        "a checkpoint": lambda: len(list((output / "checkpoints").glob("*/step-*"))) >= 3,
    }
    for what, reached in moments.items():
        driver = Driver(whole_job, output)
        driver.wait_for(what, reached)
        driver.kill()
    kept = {p: p.stat().st_mtime_ns for p in (output / "gradients").rglob("*.npy")}
    steps = max(int(p.name.removeprefix("step-")) for p in (output / "checkpoints").glob("*/step-*"))
    assert steps > 0
    Driver(whole_job, output).finish()
    assert_same_end(output, finished_run)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept, "finished gradients were computed again"


@pytest.mark.slow
def test_workers_killed_in_gradients_and_training(whole_job, finished_run, tmp_path):
    output = tmp_path / "run"
    driver = Driver(whole_job, output)
    driver.wait_for("a gradient actor", lambda: kill_worker(driver, "ray::GradientReplica"))
    driver.wait_for("a checkpoint", lambda: any((output / "checkpoints").glob("*/step-*")))
    driver.wait_for("a training worker", lambda: kill_worker(driver, "ray::RayTrainWorker"))
    driver.finish()
    assert_same_end(output, finished_run)


@pytest.mark.slow
def test_ctrl_c_in_search_and_training(obeys_ctrl_c, whole_job, finished_run, tmp_path):
    output = tmp_path / "run"
    moments = {
        "the search": lambda: (output / "affinity.json").exists() and not (output / "partition.json").exists(),
        "a checkpoint": lambda: any((output / "checkpoints").glob("*/step-*")),
    }
    for what, reached in moments.items():
        driver = Driver(whole_job, output)
        driver.wait_for(what, reached)
        started = children_of(driver.process.pid)
        driver.process.send_signal(signal.SIGINT)
        assert driver.process.wait(TIMEOUT) == 130, what
        assert (tmp_path / "log.txt").read_text().rstrip().endswith("interrupted; the same command goes on from here")
        deadline = time.monotonic() + 60  # Ray's processes end a moment after the driver
        while left := [pid for pid in started if Path(f"/proc/{pid}").exists()]:
            assert time.monotonic() < deadline, f"the run's Ray was left behind: {left}"
            time.sleep(0.1)
    assert not any((output / "adapters").glob("*")), "it trained to the end first"
    Driver(whole_job, output).finish()
    told = (tmp_path / "log.txt").read_text().rpartition("interrupted;")[2]
    assert int(re.findall(r"training \d+ adapters: (\d+)/", told)[0]) > 0, "steps made before count as made now"
    assert_same_end(output, finished_run)
