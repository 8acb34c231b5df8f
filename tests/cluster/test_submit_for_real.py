"""Jobs submitted to a head with a token: refused without it, followed, refused twice, cancelled, and finished."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import yaml
from job_server import SECRET, VERSION, Head, bearer, started_head, write_job_beside_its_files, write_wheel

from ray_ensemble.status import run_status

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with started_head() as found:
        yield found


@pytest.fixture(scope="module")
def wheel(head: Head) -> Path:
    return write_wheel(head.folder)


@pytest.fixture(scope="module")
def job(head: Head, tiny_model: Path) -> Path:
    return write_job_beside_its_files(head.folder / "job", tiny_model)


def test_without_the_token_a_job_is_refused(head, job):
    code, told = head.submit(job, "--output", "/tmp/nothing", token=None)
    assert (code, "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH" in told) == (2, True), told
    code, told = head.submit(job, "--output", "/tmp/nothing", token="f" * 64)
    assert (code, "it refuses this token" in told) == (2, True), told
    assert "Traceback" not in told
    assert requests.get(f"{head.address}/api/jobs/", headers=bearer(), timeout=30).json() == []


def test_a_job_is_followed_to_its_end_and_its_output_is_its_own(head, job, wheel):
    output = head.folder / "runs" / "first"
    following = head.start(job, "--output", output, "--wheel", wheel, "--set", "training.seed=5")
    deadline = time.monotonic() + 300
    while not (output / "lease.json").exists():
        assert following.poll() is None, following.communicate()[0]
        assert time.monotonic() < deadline, "the job did not start"
        time.sleep(0.5)
    assert run_status(output)["owner"]["alive"]
    code, told = head.submit(job, "--output", f"{output}/", "--wheel", wheel)
    assert (code, "is writing there" in told) == (2, True), told
    # Ctrl-C ends following, not the job.
    following.send_signal(signal.SIGINT)
    told = following.communicate(timeout=60)[0]
    assert following.returncode == 130, told
    assert "goes on; follow it with" in told
    identity = told.split("--attach ")[1].split()[0]
    code, told = head.submit("--attach", identity)
    assert code == 0, told
    assert "report: " in told.lower()
    assert run_status(output)["state"] == "finished"
    assert set(json.loads((output / "metrics.json").read_text())["tasks"]) == {"films", "contrary"}
    assert json.loads((output / "plan.json").read_text())["version"] == VERSION
    config = yaml.safe_load((output / "config.yaml").read_text())
    assert config["training"]["seed"] == 5
    assert Path(config["model"]["source"]).is_relative_to(head.folder / "runs" / "first.inputs")
    known = requests.get(f"{head.address}/api/jobs/", headers=bearer(), timeout=30).text
    assert identity in known
    assert SECRET not in known
    listed = [entry["metadata"] or {} for entry in json.loads(known) if entry["submission_id"] == identity]
    assert [about["ray_ensemble_run"] for about in listed] == ["first"]
    assert listed[0]["ray_ensemble_output"] == str(output)
    assert (listed[0]["ray_ensemble_model"], listed[0]["ray_ensemble_tasks"]) == ("model", "2")
    # The same again finds everything done.
    code, told = head.submit(job, "--output", output, "--wheel", wheel, "--set", "training.seed=5")
    assert code == 0, told
    assert "train: done before" in told


def test_exit_codes_cancelling_and_unknown_jobs(head, job, wheel):
    code, told = head.submit(
        job, "--output", head.folder / "runs" / "third", "--wheel", wheel, "--env", "ABSENT_VARIABLE"
    )
    assert (code, "--env ABSENT_VARIABLE: not set on the cluster" in told) == (2, True), told
    code, told = head.submit(job, "--output", head.folder / "runs" / "second", "--wheel", wheel, "--no-follow")
    assert code == 0, told
    identity = told.split("--cancel ")[1].split()[0]
    code, told = head.submit("--cancel", identity)
    assert (code, told.strip()) == (0, f"{identity}: cancelled")
    code, told = head.submit("--attach", identity)
    assert (code, "was cancelled" in told) == (1, True), told
    code, told = head.submit("--cancel", "nobody")
    assert (code, "no job nobody there" in told) == (2, True), told
