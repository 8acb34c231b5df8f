"""A Ray head with a job server on loopback that asks for a token, and what is submitted to it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests
import yaml
from tiny import write_task

import ray_ensemble

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


def bearer() -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKEN}"}


@contextmanager
def started_head() -> Iterator[Head]:
    """A head of two CPUs, with the variables of this process but for Ray's."""
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


def write_wheel(folder: Path) -> Path:
    """A wheel of the package as it is, but for its version."""
    path = folder / f"ray_ensemble-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file in PACKAGE.rglob("*.py"):
            text = file.read_text()
            if file.name == "version.py":
                text = f'__version__ = "{VERSION}"\n'
            archive.writestr(str(file.relative_to(PACKAGE.parent)), text)
    return path


def write_job_beside_its_files(folder: Path, model: Path) -> Path:
    """Model and data beside the job file, named by relative paths."""
    shutil.copytree(model, folder / "model")
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
