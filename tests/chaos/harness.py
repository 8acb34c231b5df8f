"""A tiny job on real Ray nodes that can be killed, and a ledger of what the job wrote: nothing finished may be written twice.

A node is a `ray start` and all processes below it. Nodes are ended by their process numbers, so that other clusters of this
machine live on. A round is `Nodes`, a copy of the undisturbed run up to some stage, a `Driver` that goes on from there, and
something that happens to it at a moment that the round's seed chooses.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from test_stop_and_go_on import Driver, assert_same_end, children_of
from tiny import write_job

STAGES = ("plan", "tasks", "gradients", "search", "train", "ensemble", "evaluate", "report")
EVERY = 4  # steps between checkpoints
RAY = Path(sys.executable).parent / "ray"
_STARTS = 3
_NODE_OPTIONS = (f"--object-store-memory={100 * 2**20}", "--min-worker-port=0", "--max-worker-port=0", "--block")
# What each stage writes, beside its manifest.
WRITES = {
    "gradients": ("gradients",),
    "search": ("affinity.json", "partition.json", "search"),
    "train": ("trained", "checkpoints", "adapters", "baselines"),
    "ensemble": ("ensemble.json", "merged", "scores"),
    "evaluate": ("metrics.json",),
    "report": ("report.html", "plots"),
}


def tiny_job(folder: Path, model: Path, tasks: Path, **changes: object) -> Path:
    """A job with enough units, trials and steps that a moment can be chosen among them."""
    settings: dict[str, object] = {
        "gradients": {"dim": 64, "batch_tokens": 128, "replicas": {"min": 1, "max": 2}},
        "search": {"groups": [2, 3], "trials": 8},
        "training": {
            "epochs": 2, "min_steps": 24, "learning_rate": 5.0e-3, "checkpoint_every": EVERY, "concurrency": 2, "max_failures": 5,
        },
    }  # fmt: skip
    return write_job(folder, model, tasks, **{**settings, **changes})


def wait_until(what: str, condition: Callable[[], bool], seconds: float = 240.0) -> None:
    """Wait for a condition, a bounded time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} in {seconds:g} s"
        time.sleep(0.05)


# Nodes ------------------------------------------------------------------------------------------------------------------


@dataclass
class Node:
    """One `ray start` and what it starts."""

    command: list[object]
    environment: Mapping[str, str]
    log: Path

    def start(self) -> None:
        """Start the processes."""
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self) -> None:
        """Until it is up. Ray gives a node 30 s, which a busy machine may not keep; then once more."""
        for _ in range(_STARTS):
            while self.process.poll() is None:
                if "Ray runtime started" in self.log.read_text():
                    return
                time.sleep(0.1)
            told = self.log.read_text()
            self.start()
        raise AssertionError(told)

    def pids(self) -> list[int]:
        """Its processes, workers and all, and those of its session that have lost their parents."""
        return [*{*children_of(self.process.pid), *_session(self.process.pid)}, self.process.pid]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all of them at once."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """The machine is gone: nothing of it says goodbye."""
        self.signal(signal.SIGSTOP)  # so that none starts another meanwhile
        self.signal(signal.SIGKILL)
        self.process.wait(30)


def title_of(pid: int) -> bytes:
    """What a process calls itself; Ray's workers tell what they are doing. Empty if it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _session(leader: int) -> list[int]:
    """All living processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError, IndexError):
            if entry.name.isdigit() and int((entry / "stat").read_text().rpartition(")")[2].split()[3]) == leader:
                found.append(int(entry.name))
    return found


class Nodes:
    """A head that holds no work, and workers of one CPU each. Leaving the block ends what is left of them.

    Args:
        workers: at the start.
        environment: of the nodes, besides this process's.
        worker_environment: of the workers alone.
        autoscaled: let Ray's autoscaler add up to two workers of one CPU, which go when they have been idle for 6 s.
        dashboard: whether the head has one.
    """

    def __init__(
        self,
        workers: int = 2,
        *,
        environment: Mapping[str, str] | None = None,
        worker_environment: Mapping[str, str] | None = None,
        autoscaled: bool = False,
        dashboard: bool = True,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rc-", dir="/tmp"))  # short: Ray's sockets lie below it
        token = self.folder / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        # Whether a cluster asks for a token depends on what ran on this machine before, unless that is said.
        self._environment = {
            **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), **(environment or {}),
        }  # fmt: skip
        self._worker_environment = {**self._environment, **(worker_environment or {})}
        self._head_options = ["--num-cpus=0", f"--include-dashboard={str(dashboard).lower()}"]
        if autoscaled:
            self._environment |= {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
        self._autoscaled = autoscaled
        self._wanted = workers
        self.workers: list[Node] = []
        self.head: Node | None = None

    def __enter__(self) -> Nodes:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_all()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> None:
        """A head at a new address, and its workers."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        scaling = []
        if self._autoscaled:
            # What Ray's `AutoscalingCluster` would read from a file that its wheel lacks. Its nodes are processes of the head's.
            config = json.loads(Path(__file__).with_name("autoscaler.json").read_text())
            config["provider"]["gcs_address"] = self.address
            (self.folder / "autoscaler.json").write_text(json.dumps(config))
            scaling = [f"--autoscaling-config={self.folder / 'autoscaler.json'}"]
        self.head = self._start(
            [
                "--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--dashboard-port=0",
                f"--temp-dir={self.folder}", *self._head_options, *scaling,
            ],
            self._environment,
        )  # fmt: skip
        self.head.wait()
        for _ in range(self._wanted):
            self.add(wait=False)
        self.wait_for(1 + self._wanted)

    def add(
        self,
        *options: str,
        wait: bool = True,
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> Node:
        """One more worker; `prefix` is what its command stands behind."""
        before = len(self.workers)
        node = self._start(
            ["--address", self.address, "--node-ip-address=127.0.0.1", "--num-cpus=1", *options],
            {**self._worker_environment, **(environment or {})},
            prefix,
        )
        self.workers.append(node)
        if wait:
            self.wait_for(2 + before)
        return node

    def kill(self, node: Node) -> None:
        """Take a worker away at once."""
        self.workers.remove(node)
        node.kill()

    def kill_all(self) -> None:
        """Take every machine away, the head first."""
        if self.head is not None:
            self.head.kill()
            self.head = None
        for node in list(self.workers):
            self.kill(node)

    def wait_for(self, nodes: int) -> None:
        """Until so many are alive."""
        for worker in self.workers:
            worker.wait()
        assert sum(bool(node["alive"]) for node in self.ask("nodes", nodes)) == nodes

    def alive(self) -> int:
        """How many nodes the head counts as alive."""
        return sum(node["alive"] for node in self.ask("nodes"))

    def environment(self) -> dict[str, str]:
        """Of a process that joins."""
        return {**self._environment, "RAY_ADDRESS": self.address}

    def ask(self, what: str, number: float = 0.0) -> list[dict[str, object]]:
        """What `asked.py` finds out of the cluster, in a process of its own, so that this one joins none."""
        script = Path(__file__).with_name("asked.py")
        done = subprocess.run(
            [sys.executable, str(script), what, str(number)],
            env=self.environment(), capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def _start(self, arguments: list[str], environment: Mapping[str, str], prefix: Sequence[str] = ()) -> Node:
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix="node-", suffix=".txt", delete=False) as log:
            node = Node([*prefix, RAY, "start", *arguments, *_NODE_OPTIONS], environment, Path(log.name))
        node.start()
        return node


@contextmanager
def memory_group(limit: int) -> Iterator[list[str]]:
    """A control group of `limit` bytes. Yields the words behind which a command runs in it and sees no other, as in a container.

    What is in the group when the block ends is killed.
    """
    root = Path("/sys/fs/cgroup")
    root, file = (root / "memory", "memory.limit_in_bytes") if (root / "memory").is_dir() else (root, "memory.max")
    group = root / f"ray-ensemble-{os.getpid()}"
    try:
        group.mkdir()
        (group / file).write_text(str(limit))
    except OSError:
        pytest.skip("only root may limit memory, and only where there are control groups")
    script = 'echo $$ > "$0/cgroup.procs" && mount --bind "$0" "$1" && shift && exec "$@"'
    try:
        yield ["unshare", "--mount", "sh", "-c", script, str(group), str(root)]
    finally:
        while pids := (group / "cgroup.procs").read_text().split():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.1)
        group.rmdir()


# The run ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """The undisturbed run of a job, and how many units, trials and steps it took."""

    job: Path
    folder: Path
    units: int
    trials: int
    steps: int

    @classmethod
    def run(cls, job: Path, folder: Path) -> Reference:
        """Run the job on Ray of this machine's own."""
        with Ledger(folder) as ledger:
            Driver(job, folder).finish()
        ledger.assert_nothing_twice()
        return cls(job, folder, ledger.count("gradients/.parts"), finished_trials(folder), sum(ledger.rows.values()))


def finished_trials(folder: Path) -> int:
    """Trials of the search that have a result."""
    return sum(path.stat().st_size > 0 for path in folder.glob("search/tune/*/result.json"))


def copy_before(stage: str, reference: Reference, target: Path) -> Path:
    """The undisturbed run as it was before a stage began."""
    shutil.copytree(reference.folder, target, dirs_exist_ok=True)
    for later in STAGES[STAGES.index(stage) :]:
        (target / "manifests" / f"{later}.json").unlink(missing_ok=True)
        for name in WRITES[later]:
            path = target / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return target


def assert_undisturbed(folder: Path, reference: Reference, through: str = "report") -> None:
    """The run ended as the undisturbed one: same partition, features and adapters, byte for byte, and the same metrics."""
    if through == "report":
        assert_same_end(folder, reference.folder)
    wanted = [*reference.folder.glob("gradients/*/*/*.npy")]
    assert wanted
    if through != "gradients":
        wanted.append(reference.folder / "partition.json")
    if through not in ("gradients", "search"):
        wanted += reference.folder.glob("adapters/*/adapter_model.safetensors")
        wanted += reference.folder.glob("baselines/*/adapter_model.safetensors")
    for file in wanted:
        assert (folder / file.relative_to(reference.folder)).read_bytes() == file.read_bytes(), file
    for log in folder.glob("trained/*/train.jsonl"):
        steps = [json.loads(line)["step"] for line in _lines(log)]
        assert steps == list(range(len(steps))), log
    listed = [
        json.loads((run / "manifests" / "gradients.json").read_text())["files"] for run in (folder, reference.folder)
    ]
    assert listed[0].keys() == listed[1].keys()
    assert not list(folder.glob("gradients/.parts"))
    assert not (folder / "lease.json").exists()


@dataclass
class Ledger:
    """Watches a run folder and notes every version of the files that hold finished work, and every row of training logs.

    What is written is renamed into place, so that another inode or time of change is another version: the work was done again.
    """

    folder: Path
    versions: dict[str, set[tuple[int, int]]] = field(default_factory=lambda: defaultdict(set))
    rows: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # of each log, repeated ones too
    restarts: list[tuple[int, int]] = field(default_factory=list)  # (newest checkpoint, first step that was made again)
    settled: dict[str, int] = field(default_factory=dict)  # results of trials when Tune wrote them down as finished

    FINISHED = (
        "gradients/.parts/*.npz",
        "gradients/*/*/*.npy",
        "trained/*/adapter_model.safetensors",
        "scores/*.npy",
        "manifests/*.json",
    )  # fmt: skip

    def __enter__(self) -> Ledger:
        self._last: dict[str, int] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def count(self, prefix: str) -> int:
        """Files with this beginning that were seen."""
        return sum(name.startswith(prefix) for name in self.versions)

    def assert_nothing_twice(self, unregistered: int = 2) -> None:
        """No finished unit, feature, adapter, score or stage was written again, and no trial was run again that Tune had on disk.

        Training may only repeat steps after the newest checkpoint that Ray Train had registered, so many before the last one.
        Tune copies results there anew with every snapshot, so that a result may look empty for a moment.
        """
        assert {name: found for name, found in self.versions.items() if len(found) > 1} == {}
        rows = {trial: (then, self._trial_rows(trial)) for trial, then in self.settled.items()}
        assert {trial: (then, now) for trial, (then, now) in rows.items() if now > max(then, 1)} == {}
        for newest, again in self.restarts:
            assert again >= newest - unregistered * EVERY, (newest, again)

    def _trial_rows(self, trial: str) -> int:
        return len(_lines(self.folder / "search" / "tune" / trial / "result.json"))

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self._look()

    def _look(self) -> None:
        with self._lock:
            for pattern in self.FINISHED:
                with suppress(FileNotFoundError):  # a folder is renamed or removed meanwhile
                    for path in self.folder.glob(pattern):
                        found = path.stat()
                        self.versions[str(path.relative_to(self.folder))].add((found.st_ino, found.st_mtime_ns))
            with suppress(FileNotFoundError):
                for path in self.folder.glob("search/tune/experiment_state-*.json"):
                    for trial in _settled_trials(path) - self.settled.keys():
                        self.settled[trial] = self._trial_rows(trial)
                for path in self.folder.glob("checkpoints/*/logs/*.jsonl"):
                    self._read(path)

    def _read(self, log: Path) -> None:
        step, before = _last_step(log), self._last.get(log.stem, -1)
        if step < 0:  # cut before the first row, or about to be removed with its finished job
            return
        if step < before:
            newest = [int(p.name.removeprefix("step-")) for p in log.parents[1].glob("step-*")]
            self.restarts.append((max(newest, default=0), step + 1))
            before = step
        self.rows[log.stem] += step - before
        self._last[log.stem] = step


def _settled_trials(snapshot: Path) -> set[str]:
    """Trials that one of Tune's snapshots has as finished."""
    try:
        states = [json.loads(state) for state, _ in json.loads(snapshot.read_text())["trial_data"]]
    except (OSError, json.JSONDecodeError):
        return set()  # replaced while it was read
    return {state["relative_logdir"] for state in states if state["status"] == "TERMINATED"}


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text().splitlines() if line.endswith("}")]
    except FileNotFoundError:
        return []


def _last_step(log: Path) -> int:
    """Step of the log's last whole row; −1 where there is none."""
    lines = _lines(log)
    try:
        return int(json.loads(lines[-1])["step"]) if lines else -1
    except json.JSONDecodeError:
        return -1


@contextmanager
def driver_on(nodes: Nodes, job: Path, folder: Path, verb: str = "run", *changes: str) -> Iterator[Driver]:
    """A driver that joins the cluster, with `changes` to the job; it is killed if the block ends before it does."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    driver = Driver(job, folder, verb, changes, nodes.environment())
    try:
        yield driver
    finally:
        if driver.process.poll() is None:
            driver.kill()
