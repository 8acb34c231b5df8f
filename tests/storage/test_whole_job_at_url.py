"""The whole job at an S3 URL: the same results as in a folder, and a new cluster goes on from what the old one put there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny import OPTIONS, write_job, write_task

from ray_ensemble.cli import main
from ray_ensemble.run_folder import STAGES
from ray_ensemble.status import run_status
from ray_ensemble.storage import Store, place_of

pytestmark = [pytest.mark.slow, pytest.mark.ray]

EXAMPLES = Path(__file__).parents[2] / "examples"
TIMEOUT = 540.0
# Parts go up as they are finished, so that a kill falls between them in a job of seconds.
CODE = """
import sys
from ray_ensemble.cli import main
from ray_ensemble.storage import mirror
mirror.PUSH_SECONDS = 0.1
sys.exit(main(sys.argv[1:]))
"""


class Driver:
    """A `ray-ensemble run` at a URL, in a process and on a cluster of its own."""

    def __init__(self, job: Path, url: str, log: Path, **environment: str) -> None:
        self.log = log
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-c", CODE, "run", str(job), "--output", url],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
            )

    def wait_for(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert self.process.poll() is None, f"ended before {what}: {self.log.read_text()}"
            assert time.monotonic() < deadline, f"no {what} in {TIMEOUT} s"
            time.sleep(0.02)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def finish(self) -> str:
        assert self.process.wait(TIMEOUT) == 0, self.log.read_text()
        return self.log.read_text()


def drop_copies() -> None:
    shutil.rmtree(os.environ["RAY_ENSEMBLE_CACHE"], ignore_errors=True)


def assert_same_end(store: Store, undisturbed: Path) -> None:
    assert store.read("partition.json") == (undisturbed / "partition.json").read_bytes()
    ours, theirs = json.loads(store.read("metrics.json")), json.loads((undisturbed / "metrics.json").read_text())
    for task, models in theirs["tasks"].items():
        for model, metric in models.items():
            assert ours["tasks"][task][model]["loss"] == pytest.approx(metric["loss"], abs=1e-6), (task, model)
            assert ours["tasks"][task][model]["accuracy"] == metric["accuracy"]
    features = list((undisturbed / "gradients").rglob("*.npy"))
    assert features
    for file in features:
        assert store.read(str(file.relative_to(undisturbed))) == file.read_bytes(), file


def test_the_same_as_in_a_folder_and_nothing_again(s3, whole_job, finished_run, task_folder, tmp_path, capsys):
    told = Driver(whole_job, s3, tmp_path / "first.txt").finish()
    store = Store(s3)
    assert_same_end(store, finished_run)
    before = store.list()
    assert not [name for name in before if name.startswith(("lease", "shared", "checkpoints/", "gradients/.parts"))]
    drop_copies()
    again = Driver(whole_job, s3, tmp_path / "second.txt").finish()
    assert [line for line in again.splitlines() if "done before" in line] == [f"{s}: done before" for s in STAGES]
    after = store.list()
    assert {n: a for n, a in after.items() if n != "session.json"} == {
        n: a for n, a in before.items() if n != "session.json"
    }
    for secret in (os.environ["AWS_SECRET_ACCESS_KEY"], os.environ["AWS_ACCESS_KEY_ID"]):
        assert secret not in told + again
        assert not [name for name in after if secret.encode() in (store.read(name) or b"")]
    # Those who read it need nothing else.
    drop_copies()
    capsys.readouterr()
    assert main(["status", s3]) == 0
    assert f"{s3}: finished" in capsys.readouterr().out
    rows = task_folder / "options" / "test.jsonl"
    assert main(["export", s3, "--output", str(tmp_path / "exported")]) == 0
    assert (tmp_path / "exported" / "adapters" / "group-0" / "adapter_model.safetensors").is_file()
    answers = []
    for run in (s3, str(finished_run)):
        # In a process of its own, whose cluster has the environment of this test.
        command = [sys.executable, "-m", "ray_ensemble.cli", "predict", run, "--task", "options", "--input", str(rows)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        answers.append([line for line in done.stdout.splitlines() if line.startswith("{")])
    assert answers[0] == answers[1]
    assert len(answers[0]) == 10
    client = [sys.executable, str(EXAMPLES / "serve_client.py"), s3, "--requests", "20"]
    done = subprocess.run(client, capture_output=True, text=True, check=False)
    assert (done.returncode, "all as predict says" in done.stdout) == (0, True), done.stdout + done.stderr
    assert not (place_of(s3) / "work").exists()
    assert not (place_of(s3) / "read" / "gradients").exists()


@pytest.fixture(scope="module")
def longer_job(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough units and steps to be killed between them."""
    folder = tmp_path_factory.mktemp("longer")
    for place, name in enumerate(("films", "phones", "options")):
        labels = OPTIONS if name == "options" else ("no", "yes")
        write_task(folder / "tasks" / name, labels, seed=place, train=256, validation=16)
    training = {"epochs": 1, "min_steps": 40, "learning_rate": 5.0e-3, "checkpoint_every": 4, "concurrency": 1}
    return write_job(
        folder, tiny_model, folder / "tasks", training=training, gradients={"dim": 256, "replicas": 1},
        search={"groups": [2], "trials": 2},
    )  # fmt: skip


@pytest.mark.chaos
def test_a_new_cluster_goes_on_without_doing_anything_twice(s3, longer_job, tmp_path):
    whole = tmp_path / "undisturbed"
    main(["run", str(longer_job), "--output", str(whole)])
    store = Store(s3)

    def parts() -> dict[str, object]:
        return dict(store.list("gradients/.parts"))

    def steps() -> dict[str, int]:
        """The last checkpoint of every pack."""
        found: dict[str, int] = {}
        for name in store.list("checkpoints"):
            _, pack, step = name.split("/")[:3]
            if step.startswith("step-"):
                found[pack] = max(found.get(pack, 0), int(step.removeprefix("step-")))
        return found

    first = Driver(longer_job, s3, tmp_path / "1.txt")
    first.wait_for("parts of the gradients", lambda: len(parts()) >= 3)
    first.kill()
    kept = parts()
    assert "gradients/info.json" not in store.list()
    drop_copies()

    seen = kept
    second = Driver(longer_job, s3, tmp_path / "2.txt")
    while "gradients/info.json" not in store.list("gradients"):
        now = parts()
        assert {name: now[name] for name in kept if name in now} == {n: a for n, a in kept.items() if n in now}, "again"
        seen = {**seen, **now}
        assert second.process.poll() is None, second.log.read_text()
    assert len(seen) > len(kept)
    status = run_status(s3)
    assert status["state"] == "running"
    second.wait_for(
        "an adapter, and steps of another",
        lambda: bool(store.list("trained")) and max(steps().values(), default=0) >= 12,
    )
    second.kill()
    trained = {name: about for name, about in store.list("trained").items() if name.endswith("result.json")}
    reached = steps()
    drop_copies()

    third, first_new = Driver(longer_job, s3, tmp_path / "3.txt"), dict[str, int]()
    while third.process.poll() is None:
        for pack, step in steps().items():
            if pack in reached and step != reached[pack]:
                first_new.setdefault(pack, step)
        time.sleep(0.05)
    third.finish()
    for pack, step in first_new.items():
        assert step > reached[pack], "training began anew"
    now = store.list("trained")
    assert {name: now[name] for name in trained} == trained, "a finished adapter was trained again"
    assert_same_end(store, whole)


@pytest.fixture
def blind_node(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A cluster whose head has no CPUs and whose one node does not see a folder: its address, and the folder."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    tried = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", str(hidden)]
    if subprocess.run(tried, capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces here")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    start = [str(Path(sys.executable).parent / "ray"), "start", "--node-ip-address=127.0.0.1", "--block",
             f"--object-store-memory={100 * 2**20}"]  # fmt: skip
    head = [*start, "--head", "--num-cpus=0", f"--port={address.rpartition(':')[2]}", "--dashboard-host=127.0.0.1",
            "--dashboard-port=0", f"--temp-dir=/tmp/ray-blind-{os.getpid()}"]  # fmt: skip
    node = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs tmpfs "{hidden}" && exec "$@"', "sh"]
    node += [*start, f"--address={address}", "--num-cpus=2"]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for name, command in (("head", head), ("node", node)):
            log = tmp_path / f"{name}.txt"
            with log.open("w") as stream:
                processes.append(subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT))
            deadline = time.monotonic() + 120
            while "Ray runtime started" not in log.read_text():
                assert processes[-1].poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.5)
        yield address, hidden
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(60)


def test_workers_see_nothing_of_the_drivers_disk(s3, whole_job, finished_run, blind_node, tmp_path):
    """Actors and training workers run on a node to which the driver's copy of the run is an empty folder."""
    address, hidden = blind_node
    told = Driver(
        whole_job, s3, tmp_path / "log.txt", RAY_ADDRESS=address, RAY_ENSEMBLE_CACHE=str(hidden)
    ).finish()  # fmt: skip
    assert "report" in told
    assert (hidden / "runs").is_dir()
    assert_same_end(Store(s3), finished_run)
