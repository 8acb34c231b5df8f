"""Commands on a run at a URL, without Ray: planning, the state of a run under way, and what is told when it is not right."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from ray_ensemble.cli import main
from ray_ensemble.errors import InputError
from ray_ensemble.runtime import handed_on
from ray_ensemble.status import run_status
from ray_ensemble.storage import Store, place_of
from ray_ensemble.storage import lease as lease_module


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(lease_module, "SETTLE_SECONDS", 0.0)


@pytest.mark.slow
def test_a_run_is_planned_followed_and_gone_on_with(s3, whole_job, tmp_path, capsys):
    assert main(["tasks", str(whole_job), "--output", s3]) == 0
    told = "".join(capsys.readouterr())
    store = Store(s3)
    names = set(store.list())
    assert {"config.yaml", "plan.json", "tasks.json", "manifests/plan.json", "manifests/tasks.json"} <= names
    assert "init/adapter_model.safetensors" in names
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert os.environ[name] not in told
        assert not [found for found in names if os.environ[name].encode() in store.read(found)]

    status = run_status(s3)
    assert (status["folder"], status["state"], status["stage"]) == (s3, "stopped", "gradients")
    assert status["stages"]["tasks"]["whole"]
    assert status["gradients"]["done"] == 0
    # What a run under way leaves: a lease, parts of the gradients a minute apart, and a log.
    held = {"id": "x", "host": "elsewhere", "machine": "m", "pid": 1, "started": "1", "heartbeat": time.time()}
    store.write("lease.json", json.dumps(held).encode())
    for i in range(2):
        with (tmp_path / "part.npz").open("wb") as stream:
            np.savez(stream, margins=np.zeros(8), features=np.zeros((8, 1000)))
        store.put(f"gradients/.parts/films-train-abc-{i}.npz", tmp_path / "part.npz")
        time.sleep(1.1)
    for _ in range(2):  # the second time from what the first brought
        status = run_status(s3)
        assert status["state"] == "running"
        assert status["gradients"]["done"] == 16
        assert 1 < status["gradients"]["per_second"] <= 8
    copies = list((place_of(s3) / "status").rglob("*.npz"))
    assert len(copies) == 2
    assert all(copy.stat().st_size < 1000 for copy in copies), "the features were brought too"
    assert [entry.stat().st_size for entry in (place_of(s3) / "status").rglob("*.safetensors")] == [0]
    store.delete(["gradients/.parts/films-train-abc-0.npz", "lease.json"])
    assert run_status(s3)["gradients"]["done"] == 8
    store.delete(["init/adapter_model.safetensors"])
    status = run_status(s3)
    assert (status["stage"], status["stages"]["plan"]["missing"]) == ("plan", ["init/adapter_model.safetensors"])


@pytest.mark.parametrize(
    "command",
    [["status"], ["predict"], ["export", "--output", "out"], ["weights", "--task-folder", "x"], ["serve"]],
    ids=lambda command: command[0],
)
def test_where_no_run_is(s3, command, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    verb, *options = command
    assert main([verb, s3, *options]) == 2
    error = capsys.readouterr().err
    assert f"{s3}: not a run folder" in error
    assert main([verb, "s3://me:planted@runs/first", *options]) == 2
    error = capsys.readouterr().err
    assert "credentials come from" in error
    assert "planted" not in error


def test_readers_take_no_names_that_lead_elsewhere(s3, tmp_path, capsys):
    store = Store(s3)
    store.write("config.yaml", b"{}")
    store.write("manifests/plan.json", json.dumps({"files": {"../../evil": "0"}}).encode())
    assert main(["export", s3, "--output", str(tmp_path / "out")]) == 2
    assert "leads out of the folder" in capsys.readouterr().err
    store.write("manifests/plan.json", b"no JSON")
    assert main(["export", s3, "--output", str(tmp_path / "out")]) == 2
    assert f"{s3}/manifests/plan.json: damaged" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_an_address_with_a_password_is_not_handed_on(monkeypatch, name):
    monkeypatch.setenv(name, "http://me:planted@host:9000")
    with pytest.raises(InputError, match=f"{name}: holds a user or password") as caught:
        handed_on()
    assert "planted" not in str(caught.value)


def test_a_local_folder_stays_local(whole_job, tmp_path, monkeypatch):
    """No store, no copy: with a path nothing is kept but the run folder."""
    monkeypatch.setenv("RAY_ENSEMBLE_CACHE", str(tmp_path / "cache"))
    assert main(["plan", str(whole_job), "--output", str(tmp_path / "run")]) == 0
    assert sorted(Path(tmp_path / "run").iterdir()) == [
        tmp_path / "run" / name for name in ("config.yaml", "init", "manifests", "plan.json")
    ]
    assert not (tmp_path / "cache" / "runs").exists()
