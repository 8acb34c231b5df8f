"""Jobs submitted to a head with a token: refused without it, followed, refused twice, cancelled, and finished."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
import yaml
from tiny import write_task

import ray_ensemble
from ray_ensemble.status import run_status

pytestmark = [pytest.mark.ray, pytest.mark.slow]
PACKAGE = Path(ray_ensemble.__file__).parent
VERSION = "9.9.9"  # of the wheel that is sent: what runs on the cluster must be that, not what is installed
SECRET = "PlantedSecretOfTheTests"
TOKEN = "0123456789abcdef" * 4


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@dataclass(frozen=True)
class Head:
    """A running head, and the files that it and its clients share."""

    address: str
    folder: Path

    def environment(self, token: str | None = TOKEN) -> dict[str, str]:
        """Of a client: nothing of Ray's but the token, and a secret that must not travel."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        kept |= {"HOME": str(self.folder), "PYTHONPATH": str(PACKAGE.parent), "HF_TOKEN": SECRET}
        if token is not None:
            file = self.folder / f"token-{token[:4]}"
            file.write_text(token)
            file.chmod(0o600)
            kept |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}
        return kept

    def start(self, *arguments: object, token: str | None = TOKEN) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "ray_ensemble.cli", "submit", *map(str, arguments), "--address", self.address]
        return subprocess.Popen(
            command, env=self.environment(token), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def submit(self, *arguments: object, token: str | None = TOKEN) -> tuple[int, str]:
        process = self.start(*arguments, token=token)
        output, _ = process.communicate(timeout=600)
        return process.returncode, output


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="re-", dir="/tmp"))  # short: Ray's sockets lie below it
    dashboard, agent, client = free_ports(3)
    found = Head(f"http://127.0.0.1:{dashboard}", folder)
    environment = found.environment()
    # No variable leads workers to our code: the wheel has to.
    del environment["PYTHONPATH"], environment["HF_TOKEN"]
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment |= {"RAY_ENSEMBLE_CACHE": str(folder / "cache"), "RAY_worker_niceness": "0"}
    command = [
        Path(sys.executable).parent / "ray", "start", "--head", "--port=0", "--num-cpus=2", f"--temp-dir={folder / 'ray'}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--ray-client-server-port={client}", f"--object-store-memory={200 * 2**20}", "--block",
    ]  # fmt: skip
    log = (folder / "head.log").open("w")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, (folder / "head.log").read_text()
            assert time.monotonic() < deadline, "the head did not start"
            try:
                if requests.get(f"{found.address}/api/version", headers=bearer(), timeout=5).ok:
                    break
            except requests.exceptions.RequestException:
                pass
            time.sleep(0.5)
        yield found
    finally:
        process.terminate()
        process.wait(60)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def bearer() -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def wheel(head: Head) -> Path:
    path = head.folder / f"ray_ensemble-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file in PACKAGE.rglob("*.py"):
            text = file.read_text()
            if file.name == "version.py":
                text = f'__version__ = "{VERSION}"\n'
            archive.writestr(str(file.relative_to(PACKAGE.parent)), text)
    return path


@pytest.fixture(scope="module")
def job(head: Head, tiny_model: Path) -> Path:
    """Model and data beside the job file, named by relative paths."""
    folder = head.folder / "job"
    shutil.copytree(tiny_model, folder / "model")
    write_task(folder / "tasks" / "films", seed=1)
    write_task(folder / "tasks" / "contrary", flip=True, seed=2)
    content = {
        "model": {"source": "./model"},
        "tasks": [{"source": "tasks"}],
        "limits": {"max_tokens": 64},
        "gradients": {"dim": 32, "replicas": 1},
        "search": {"groups": [2], "trials": 2},
        "training": {"epochs": 1, "min_steps": 4, "pack": 3},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(content))
    return folder / "job.yaml"


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
