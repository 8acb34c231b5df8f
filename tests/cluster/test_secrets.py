"""Secrets in the environment of a run do not get into its folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from ray_ensemble.cli import main

# Values that nothing else contains, under the names that tools give to secrets.
PLANTED = {
    "HF_TOKEN": "hf_PlantedSecretOfTheTests0",
    "WANDB_API_KEY": "PlantedSecretOfTheTests1",
    "AWS_SECRET_ACCESS_KEY": "PlantedSecretOfTheTests2",
    "GOOGLE_APPLICATION_CREDENTIALS": "/PlantedSecretOfTheTests3.json",
    "SOME_PASSWORD": "PlantedSecretOfTheTests4",
}


def files_with(folder: Path, secrets: Iterable[str]) -> list[Path]:
    wanted = [secret.encode() for secret in secrets]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if any(secret in path.read_bytes() for secret in wanted)]


def test_the_search_finds_what_is_there(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.bin").write_bytes(b"\x00" + PLANTED["HF_TOKEN"].encode())
    (tmp_path / "clean").write_text("nothing")
    assert files_with(tmp_path, PLANTED.values()) == [tmp_path / "a" / "b.bin"]


def test_plan_and_tasks_keep_no_secret(whole_job, tmp_path, monkeypatch, capsys):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    assert main(["tasks", str(whole_job), "--output", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "tasks.json").is_file()
    assert files_with(tmp_path / "run", PLANTED.values()) == []
    told = "".join(capsys.readouterr())
    assert not [value for value in PLANTED.values() if value in told]


@pytest.mark.slow
@pytest.mark.ray
def test_a_whole_run_keeps_no_secret(whole_job, tmp_path):
    """In a process of its own, whose environment Ray takes over; what Ray and Tune leave is searched too."""
    environment = {**os.environ, **PLANTED}
    environment.pop("RAY_ADDRESS", None)
    command = [
        sys.executable,
        "-m",
        "ray_ensemble.cli",
        "run",
        str(whole_job),
        "--output",
        str(tmp_path / "run"),
        "--set",
        "training.pack=4",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert files_with(tmp_path / "run", PLANTED.values()) == []
    assert not [value for value in PLANTED.values() if value in done.stdout + done.stderr]
