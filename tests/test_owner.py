"""A run folder has one owner at a time, who alone may change it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ray_ensemble.config import JobConfig, load_config
from ray_ensemble.errors import InputError, RunError
from ray_ensemble.run_folder import LEASE_SECONDS, STAGES, RunFolder, open_run
from ray_ensemble.storage import Lease, LocalFolder
from ray_ensemble.storage import lease as lease_module
from ray_ensemble.storage import local as local_module

OWNER = """
import sys, time
from ray_ensemble.config import JobConfig
from ray_ensemble.run_folder import open_run
config = JobConfig.model_validate({'model': {'source': 'a/b'}, 'tasks': ['/data']})
print('ready', flush=True)
sys.stdin.readline()
with open_run(sys.argv[1], config):
    print('mine', flush=True)
    time.sleep(60)
"""


def job(**changes) -> JobConfig:
    return JobConfig.model_validate({"model": {"source": "a/b"}, "tasks": ["/data"], **changes})


def come(folder: Path) -> subprocess.Popen[str]:
    """A process that owns the folder once it has read a line."""
    pipe = subprocess.PIPE
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder)], stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "ready\n"
    return owner


def say(owner: subprocess.Popen[str]) -> None:
    assert owner.stdin is not None
    owner.stdin.write("\n")
    owner.stdin.flush()


def hear(owner: subprocess.Popen[str]) -> str:
    assert owner.stdout is not None
    return owner.stdout.readline()


def a_lease(path: Path, **changes) -> Lease:
    how = {"expires": LEASE_SECONDS, "beat": 0.05, "settle": 0.0, **changes}
    return Lease(LocalFolder(path), lambda pid: "now" if pid == os.getpid() else None, **how)


def held_by(path: Path) -> dict:
    return json.loads((path / "lease.json").read_text())


def leave(path: Path, age: float = 0.0, **changes) -> None:
    """A lease that another left in the folder, `age` seconds ago by the file system's clock."""
    path.mkdir(parents=True, exist_ok=True)
    lease = {"id": "x", "host": "elsewhere", "machine": "other", "pid": 1, "started": "1", "heartbeat": time.time()}
    (path / "lease.json").write_text(json.dumps({**lease, **changes}))
    when = time.time() - age
    os.utime(path / "lease.json", (when, when))


def wait_for(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_living_owner_keeps_others_out(tmp_path):
    owner = come(tmp_path / "run")
    try:
        say(owner)
        assert hear(owner) == "mine\n"
        with pytest.raises(InputError, match=f"process {owner.pid}"), open_run(tmp_path / "run", job()):
            pass
    finally:
        owner.kill()
        owner.wait()
    with open_run(tmp_path / "run", job()):  # the owner is dead, so its lease is void at once
        assert held_by(tmp_path / "run")["pid"] == os.getpid()
    assert not (tmp_path / "run" / "lease.json").exists()


def test_who_is_kept_out_changes_nothing(tmp_path):
    """Not the config, and not what the owner has finished, even where it asks for another job to be run."""
    with open_run(tmp_path / "run", job()) as folder:
        for stage in STAGES:
            (folder / f"{stage}.out").write_text(stage)
            folder.finish(stage, [folder / f"{stage}.out"], {})
        with (
            pytest.raises(InputError, match="another run owns this folder"),
            open_run(tmp_path / "run", job(training={"epochs": 7}), redo=True),
        ):
            pass
        assert all(folder.whole(stage) for stage in STAGES)
        assert load_config(folder / "config.yaml") == folder.config
    with open_run(tmp_path / "run", job(training={"epochs": 7}), redo=True) as folder:
        assert not folder.whole("train")


def test_of_processes_that_come_at_once_one_stays(tmp_path):
    owners = [come(tmp_path / "run") for _ in range(4)]
    try:
        for owner in owners:
            say(owner)
        answers = [hear(owner) for owner in owners]
        inside = [owner for owner, answer in zip(owners, answers, strict=True) if answer == "mine\n"]
        assert len(inside) == 1
        assert held_by(tmp_path / "run")["pid"] == inside[0].pid
    finally:
        for owner in owners:
            owner.kill()
            owner.wait()


@pytest.mark.parametrize(("age", "refused"), [(5.0, True), (LEASE_SECONDS + 1, False)])
@pytest.mark.parametrize("same", ["nothing", "the number", "the name"])
def test_an_owner_on_another_machine_is_judged_by_its_heartbeat(tmp_path, age, refused, same):
    """Two containers may both be process 1, and two machines have one name; clocks may differ by hours."""
    import socket

    changes = {"nothing": {}, "the number": {"pid": os.getpid()}, "the name": {"host": socket.gethostname()}}[same]
    leave(tmp_path, age, heartbeat=time.time() + 7200, **changes)
    if refused:
        with pytest.raises(InputError, match="another run owns this folder"), a_lease(tmp_path).held():
            pass
    else:
        with a_lease(tmp_path).held():
            assert held_by(tmp_path)["machine"] != "other"


def test_an_owner_that_was_taken_over_ends_and_leaves_the_new_lease(tmp_path, monkeypatch):
    """As after a pause of its machine for longer than a lease lasts."""
    monkeypatch.setattr(lease_module, "BEAT_SECONDS", 0.1)

    def own() -> None:
        with a_lease(tmp_path, beat=0.2).held():
            while held_by(tmp_path)["id"] != "taker":  # the owner may be about to write its heartbeat
                leave(tmp_path, id="taker", pid=7)
                time.sleep(0.5)
            time.sleep(30)

    with pytest.raises(RunError, match="taken over by process 7 on elsewhere"):
        own()
    assert held_by(tmp_path)["id"] == "taker"


def test_a_heartbeat_that_finds_the_disk_full_does_not_end_the_lease(tmp_path, monkeypatch):
    tries, full, whole_file = [], threading.Event(), local_module.whole_file

    def write(path):
        tries.append(path)
        if full.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole_file(path)

    monkeypatch.setattr(local_module, "whole_file", write)
    with a_lease(tmp_path).held():
        full.set()
        failed = len(tries)
        wait_for(lambda: len(tries) > failed + 2)
        full.clear()
        before = (tmp_path / "lease.json").stat().st_mtime_ns
        wait_for(lambda: (tmp_path / "lease.json").stat().st_mtime_ns > before)


def test_a_folder_that_is_full_from_the_start_is_told(tmp_path, monkeypatch):
    def write(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(local_module, "whole_file", write)
    with pytest.raises(RunError, match=r"cannot be written \(No space left on device\)"), a_lease(tmp_path).held():
        pass


def test_a_folder_of_any_name_has_a_lease(tmp_path):
    """What no URL could hold."""
    place = tmp_path / "a b%20?x=1#'é"
    with open_run(place, job()) as folder:
        assert held_by(place)["pid"] == os.getpid()
        assert isinstance(folder, RunFolder)
    assert not (place / "lease.json").exists()
