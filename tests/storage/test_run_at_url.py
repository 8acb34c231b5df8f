"""A run folder at a URL: what makes a stage whole, what a kill leaves, one owner at a time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ray_ensemble.config import JobConfig
from ray_ensemble.errors import InputError, RunError
from ray_ensemble.files import write_json
from ray_ensemble.run_folder import LEASE_SECONDS, STAGES, RunFolder, open_run
from ray_ensemble.storage import Lease, Store, adapter_copy, bring, located, origin, place_of, run_copy, run_files
from ray_ensemble.storage import lease as lease_module
from ray_ensemble.storage import mirror as mirror_module


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(lease_module, "SETTLE_SECONDS", 0.0)


def job(**changes) -> JobConfig:
    return JobConfig.model_validate({"model": {"source": "a/b"}, "tasks": ["/data"], **changes})


def finish(folder: RunFolder, *stages: str) -> None:
    for stage in stages:
        file = folder / stage / "out.bin"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(stage.encode() * 100)
        folder.finish(stage, [file], {"seconds": 1.0})


def drop_copies() -> None:
    shutil.rmtree(Path(os.environ["RAY_ENSEMBLE_CACHE"]), ignore_errors=True)


def whole(folder: RunFolder) -> list[str]:
    return [stage for stage in STAGES if folder.whole(stage)]


def test_a_run_goes_on_where_nothing_is_kept_locally(url):
    with open_run(url, job()) as folder:
        finish(folder, *STAGES[:3])
        (folder / "scores").mkdir()
        (folder / "scores" / "films.npy").write_bytes(b"a score")
    drop_copies()
    with open_run(url, job()) as folder:
        assert whole(folder) == list(STAGES[:3])
        assert (folder / "scores" / "films.npy").read_bytes() == b"a score"
        finish(folder, *STAGES[3:])
    store = Store(url)
    assert {f"manifests/{stage}.json" for stage in STAGES} <= set(store.list())
    assert not [name for name in store.list() if name.startswith(("lease", "clock", "shared"))]
    assert run_files(url).joinpath("report", "out.bin").read_bytes() == b"report" * 100


def test_the_manifest_comes_last(url, monkeypatch):
    put: list[str] = []
    original = Store.put

    def recorded(self: Store, name: str, source: Path) -> None:
        put.append(name)
        original(self, name, source)

    monkeypatch.setattr(Store, "put", recorded)
    with open_run(url, job()) as folder:
        for name in ("x/result.json", "x/adapter_config.json", "x/weights.bin"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(name)
        finish(folder, "plan")
    assert put.index("manifests/plan.json") > max(put.index(name) for name in put if name.startswith(("x/", "plan/")))
    assert put.index("x/weights.bin") < put.index("x/adapter_config.json") < put.index("x/result.json")


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_kill_between_files_and_manifest_leaves_the_stage_not_whole(url, monkeypatch, elsewhere):
    with open_run(url, job()) as folder:
        finish(folder, "plan")

    def killed(self: Store, name: str, source: Path) -> None:
        if name.startswith("manifests/"):
            raise KeyboardInterrupt
        original(self, name, source)

    original = Store.put
    monkeypatch.setattr(Store, "put", killed)
    with pytest.raises(KeyboardInterrupt), open_run(url, job()) as folder:
        finish(folder, "tasks")
    monkeypatch.setattr(Store, "put", original)
    assert "tasks/out.bin" in Store(url).list()
    assert "manifests/tasks.json" not in Store(url).list()
    if elsewhere:
        drop_copies()
    with open_run(url, job()) as folder:
        assert whole(folder) == ["plan"]
        assert (folder / "tasks" / "out.bin").is_file()  # and what was finished is not lost


def test_manifests_go_before_anything_of_their_stages_is_changed(url):
    with open_run(url, job()) as folder:
        finish(folder, *STAGES)
        folder.forget_from("train")
        assert sorted(Store(url).list("manifests")) == sorted(f"manifests/{stage}.json" for stage in STAGES[:4])


def test_a_kill_after_a_manifest_was_deleted_leaves_the_stage_not_whole(url, monkeypatch):
    with open_run(url, job()) as folder:
        finish(folder, *STAGES)

    def killed(self: Path, missing_ok: bool = False) -> None:
        raise KeyboardInterrupt

    def forget() -> None:
        with monkeypatch.context() as patch, open_run(url, job()) as folder:
            patch.setattr(Path, "unlink", killed)
            folder.forget_from("train")

    with pytest.raises(KeyboardInterrupt):
        forget()
    with open_run(url, job()) as folder:
        assert whole(folder) == list(STAGES[:4])


def test_redo_and_other_jobs_as_in_a_folder(url):
    with open_run(url, job()) as folder:
        finish(folder, *STAGES)
    drop_copies()
    other = job(training={"learning_rate": 0.1})
    with (
        pytest.raises(InputError, match=r"--output .*://.* belongs to a run with another config"),
        open_run(url, other),
    ):
        pass
    with open_run(url, other, redo=True) as folder:
        assert whole(folder) == list(STAGES[:4])


@pytest.mark.parametrize("harm", ["missing", "changed"])
def test_damage_in_the_store_is_named(url, harm, capsys):
    with open_run(url, job()) as folder:
        finish(folder, *STAGES)
    drop_copies()
    store = Store(url)
    if harm == "missing":
        store.delete(["search/out.bin"])
    else:
        store.write("search/out.bin", b"searcH" * 100)
    with pytest.raises(InputError, match=rf"{url}/search/out\.bin: .*{'missing' if harm == 'missing' else 'damaged'}"):
        run_files(url)
    with open_run(url, job()) as folder:
        assert [stage for stage in STAGES if not folder.whole(stage)] == ["search"]
    assert f"{url}/search/out.bin: {'missing' if harm == 'missing' else 'damaged'}" in capsys.readouterr().out


@pytest.mark.parametrize("harm", ["missing", "changed"])
def test_damage_of_the_local_copy_is_mended_from_the_store(url, harm, capsys):
    with open_run(url, job()) as folder:
        finish(folder, *STAGES)
        file = folder / "search" / "out.bin"
        if harm == "missing":
            file.unlink()
        else:
            before = file.stat()
            file.write_bytes(b"searcH" * 100)
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # unseen by who looks at times alone
        assert whole(folder) == list(STAGES)
    assert "damaged" not in capsys.readouterr().out


def test_what_is_finished_goes_up_while_the_stage_runs_and_what_goes_is_deleted(url, monkeypatch):
    monkeypatch.setattr(mirror_module, "PUSH_SECONDS", 0.05)
    store = Store(url)

    def wait_for(condition) -> None:
        deadline = time.monotonic() + 30
        while not condition(set(store.list())):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    with open_run(url, job()) as folder:
        parts = folder / "gradients" / ".parts"
        parts.mkdir(parents=True)
        for i in range(5):
            (parts / f"films-{i}.npz").write_bytes(bytes([i]) * 10)
            (parts / f".films-{i}.npz.abc.tmp").write_bytes(b"half")
        wait_for(lambda names: len([n for n in names if n.startswith("gradients/.parts/")]) == 5)
        assert not [name for name in store.list() if name.endswith(".tmp")]
        shutil.rmtree(parts)
        (folder / "gradients" / "info.json").write_text("{}")
        wait_for(lambda names: {n for n in names if n.startswith("gradients/")} == {"gradients/info.json"})


def test_what_a_killed_run_had_not_put_up_is_kept_unless_another_was_there(url):
    with open_run(url, job()) as folder:
        finish(folder, "plan")
    late = place_of(url) / "work" / "scores" / "late.npy"
    late.parent.mkdir()
    late.write_bytes(b"finished while the network was down")
    with open_run(url, job()):
        pass
    assert Store(url).read("scores/late.npy") == late.read_bytes()
    drop_copies()
    with open_run(url, job()):  # elsewhere, as it were
        kept = place_of(url) / "work"
        shutil.copytree(kept, kept.with_name("before"))
    shutil.copytree(kept, kept.with_name("mine"))
    with open_run(url, job()) as folder:
        finish(folder, "tasks")
    shutil.rmtree(kept)
    shutil.copytree(kept.with_name("before"), kept)
    (kept / "scores" / "stale.npy").write_bytes(b"of before")
    with open_run(url, job()) as folder:
        assert whole(folder) == ["plan", "tasks"]
        assert not (folder / "scores" / "stale.npy").exists()


def test_a_copy_that_is_removed_under_an_open_run_takes_nothing_along(url):
    def run() -> None:
        with open_run(url, job()) as folder:
            finish(folder, "plan", "tasks")
            shutil.rmtree(folder.path)

    with pytest.raises(RunError, match="was removed while the run is open"):
        run()
    with open_run(url, job()) as folder:
        assert whole(folder) == ["plan", "tasks"]


def test_a_folder_with_other_things_is_refused(url):
    Store(url).write("thesis.tex", b"")
    with pytest.raises(InputError, match="not a run folder"), open_run(url, job()):
        pass


def test_a_local_copy_is_no_run_folder_of_its_own_until_it_is_moved(url, tmp_path):
    with open_run(url, job()) as folder:
        finish(folder, "plan")
    assert origin(folder.path) == url
    with pytest.raises(InputError, match="give the URL"):
        RunFolder(folder.path, job())
    moved = Path(shutil.copytree(folder.path, tmp_path / "moved"))
    assert origin(moved) is None
    assert RunFolder(moved, job()).whole("plan")


# The lease --------------------------------------------------------------------------------------------------------------


def a_lease(store: Store, **changes) -> Lease:
    how = {"expires": LEASE_SECONDS, "beat": 0.05, "settle": 0.0, **changes}
    return Lease(store, lambda pid: "now" if pid == os.getpid() else None, **how)


def test_a_living_owner_keeps_others_out(s3):
    code = (
        "import sys, time\nfrom ray_ensemble.config import JobConfig\nfrom ray_ensemble.run_folder import open_run\n"
        "config = JobConfig.model_validate({'model': {'source': 'a/b'}, 'tasks': ['/data']})\n"
        "with open_run(sys.argv[1], config):\n    print('mine', flush=True)\n    time.sleep(60)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, s3], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "mine\n"
        with pytest.raises(InputError, match=f"another run owns this folder .process {owner.pid}"), open_run(s3, job()):
            pass
    finally:
        owner.kill()
        owner.wait()
    with open_run(s3, job()):  # the owner is dead, and was of this machine
        assert json.loads(Store(s3).read("lease.json"))["pid"] == os.getpid()
    assert Store(s3).read("lease.json") is None


@pytest.mark.parametrize(("age", "refused"), [(0.0, True), (3.0, False)])
def test_an_owner_elsewhere_is_judged_by_the_stores_clock(url, age, refused):
    """Its own clock, which the heartbeat was written by, may be off by hours."""
    store = Store(url)
    held = {"id": "x", "host": "elsewhere", "machine": "other", "pid": 1, "started": "1"}
    hours = -7200 if refused else 7200
    store.write("lease.json", json.dumps({**held, "heartbeat": time.time() + hours}).encode())
    if store.about("lease.json").written is None:
        pytest.skip("a store without a clock is believed the owner's")
    time.sleep(age)
    lease = a_lease(store, expires=2.0)
    if refused:
        with pytest.raises(InputError, match="process 1 on elsewhere"), lease.held():
            pass
    else:
        with lease.held():
            pass


def test_two_in_one_process_are_two(s3):
    store = Store(s3)
    with a_lease(store).held(), pytest.raises(InputError, match="another run owns"), a_lease(store).held():
        pass


def test_of_many_that_come_at_once_one_stays(s3):
    """All see no lease; all write; the one whose write was last reads its own name back."""
    store, inside, refused = Store(s3), [], []
    together, over = threading.Barrier(6), threading.Event()

    def come() -> None:
        lease = a_lease(store, settle=1.5)
        lease._refuse_living_owner()
        together.wait()
        lease._refuse_living_owner = lambda: None
        try:
            with lease.held():
                inside.append(lease)
                over.wait(30)
        except InputError as error:
            refused.append(str(error))
            if len(refused) == 5:
                over.set()

    threads = [threading.Thread(target=come) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(inside) == 1
    assert all("at the same moment" in text for text in refused)


@pytest.mark.parametrize("beat", [0.1, 100.0])
def test_an_owner_that_was_taken_over_ends_and_writes_nothing_more(s3, monkeypatch, beat):
    """Told by its heartbeat, which interrupts it, or by the next look before it writes."""
    taker = {"id": "taker", "host": "elsewhere", "machine": "other", "pid": 7, "started": "1", "heartbeat": time.time()}
    monkeypatch.setattr(lease_module, "BEAT_SECONDS", beat)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

    def run() -> None:
        with open_run(s3, job()) as folder:
            finish(folder, "plan")
            # The owner may be about to write its heartbeat: a real taker reads back what it wrote, and comes again.
            while json.loads(Store(s3).read("lease.json"))["id"] != "taker":
                Store(s3).write("lease.json", json.dumps(taker).encode())
                time.sleep(0.5 if beat < 1 else 0)
            (folder / "late").write_text("too late")
            time.sleep(30 if beat < 1 else 0)  # is interrupted
            finish(folder, "tasks")

    try:
        with pytest.raises(RunError, match="taken over by process 7 on elsewhere"):
            run()
    finally:
        signal.signal(signal.SIGINT, before)
    store = Store(s3)
    assert json.loads(store.read("lease.json"))["id"] == "taker", "the new owner's lease was taken away"
    assert "late" not in store.list()
    assert "manifests/tasks.json" not in store.list()


# Between driver and workers -------------------------------------------------------------------------------------------------


def adapter(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_text(text)
    return folder


def test_workers_get_adapters_by_what_they_hold(url, tmp_path, monkeypatch):
    with open_run(url, job()) as folder:
        first = located(folder.path, adapter(folder / "init", "theta 0"))
        assert str(folder.path) not in first
        monkeypatch.setenv("RAY_ENSEMBLE_CACHE", str(tmp_path / "cache of a worker"))
        assert (adapter_copy(first) / "adapter_model.safetensors").read_text() == "theta 0"
        monkeypatch.setenv("RAY_ENSEMBLE_CACHE", str(tmp_path / "cache"))
        shutil.rmtree(folder / "init")
        second = located(folder.path, adapter(folder / "init", "theta 1"))
        monkeypatch.setenv("RAY_ENSEMBLE_CACHE", str(tmp_path / "cache of a worker"))
        assert (adapter_copy(first) / "adapter_model.safetensors").read_text() == "theta 0"
        assert (adapter_copy(second) / "adapter_model.safetensors").read_text() == "theta 1"
        digest = second.rpartition("#")[2]
        Store(url).write(f"shared/{digest}/adapter_model.safetensors", b"spoiled")
        shutil.rmtree(tmp_path / "cache of a worker")
        with pytest.raises(InputError, match=f"shared/{digest}: damaged"):
            adapter_copy(second)
    plain = adapter(tmp_path / "plain", "x")
    assert located(tmp_path, plain) == str(plain)
    assert adapter_copy(str(plain)) == plain


def test_what_a_worker_writes_comes_to_the_driver(url, tmp_path):
    with open_run(url, job()) as folder:
        log = "checkpoints/pack/logs/key.jsonl"
        with run_copy(url, ["checkpoints/pack/logs"]) as copy:
            assert copy.folder != folder.path
            (copy.folder / log).parent.mkdir(parents=True)
            (copy.folder / log).write_text("1\n")
            copy.send()
            bring(folder.path, "checkpoints/pack/logs")
            assert (folder / log).read_text() == "1\n"
        with run_copy(url, ["checkpoints/pack/logs"]) as copy:  # a second attempt, on another node
            assert (copy.folder / log).read_text() == "1\n"
            (copy.folder / log).write_text("1\n2\n")
            write_json(copy.folder / "trained" / "key" / "result.json", {"steps": 2})
        bring(folder.path, "checkpoints/pack/logs", "trained/key")
        assert (folder / log).read_text() == "1\n2\n"
        assert json.loads((folder / "trained" / "key" / "result.json").read_text()) == {"steps": 2}
    drop_copies()
    with open_run(url, job()) as folder:
        assert (folder / "trained" / "key" / "result.json").is_file()
        assert not (folder / "checkpoints").exists()
    with run_copy(str(tmp_path), []) as copy:
        assert copy.folder == tmp_path


def test_a_lease_that_is_written_all_the_time_is_never_taken_for_lost(s3):
    """Heartbeats as fast as they go, while the main thread looks."""
    store = Store(s3)
    lease = a_lease(store, beat=0.001)
    with lease.held():
        for _ in range(150):
            lease.confirm()


def test_an_owner_is_seen_whatever_moment_it_is_looked_at(s3, monkeypatch):
    """Stores are asked for a length first and then for the bytes; leases of other lengths come in between."""
    monkeypatch.setattr(lease_module, "_LOOKS", (0.0, *[0.05] * 5))
    store, stop = Store(s3), threading.Event()
    held = {"host": "h", "machine": "m", "pid": 1, "started": "1", "heartbeat": 1}
    store.write("lease.json", json.dumps(held).encode())

    def write() -> None:
        size = 0
        while not stop.is_set():
            size = (size * 7 + 1) % 50
            store.write("lease.json", json.dumps({**held, "host": "h" * size}).encode())
            time.sleep(0.05)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(150):
            assert a_lease(store)._read() is not None
    finally:
        stop.set()
        writer.join()


def test_a_lease_that_was_removed_ends_the_run(s3, monkeypatch):
    monkeypatch.setattr(lease_module, "_LOOKS", (0.0, 0.01))
    lease = a_lease(Store(s3), beat=100.0)
    with pytest.raises(RunError, match="removed the lease"), lease.held():  # noqa: PT012
        lease.confirm()
        Store(s3).delete(["lease.json"])
        lease.confirm()
