"""The gradient pass by Ray actors: the same bytes for any number of them, and after any of them is killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import write_model, write_task

from ray_ensemble.config import AdapterConfig, GradientsConfig, LimitsConfig, TaskConfig
from ray_ensemble.gradients import GradientStore, ReplicaSpec, collect_gradients
from ray_ensemble.models import draw_initial_adapter, load_base, load_tokenizer
from ray_ensemble.tasks import EncodedTask, encode_task, load_tasks

pytestmark = pytest.mark.ray
OPTIONS = ("(A)", "(B)", "(C)", "(D)")


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[EncodedTask], ReplicaSpec]:
    """Two tasks and a base of six layers."""
    folder = tmp_path_factory.mktemp("setting")
    write_task(folder / "tasks" / "films", seed=1, train=80, validation=20)
    write_task(folder / "tasks" / "options", OPTIONS, seed=4, train=60, validation=20)
    model = write_model(folder / "model", layers=6)
    draw_initial_adapter(load_base(model, "none", torch.device("cpu")), AdapterConfig(), folder / "init")
    tasks = load_tasks([TaskConfig(source=str(folder / "tasks"))], LimitsConfig(), folder)
    tokenizer = load_tokenizer(model)
    encoded = [encode_task(task, tokenizer, 64, False) for task in tasks]
    return encoded, ReplicaSpec(str(model), "none", str(folder / "init"), 0)


def collect(setting, folder: Path, **changes) -> GradientStore:
    tasks, spec = setting
    config = GradientsConfig(dim=64, batch_tokens=128, **changes)
    collect_gradients(tasks, spec, config, {"model": "tiny"}, folder)
    return GradientStore.open(folder)


@pytest.fixture(scope="module")
def one_replica(setting, ray_cluster, tmp_path_factory) -> GradientStore:
    return collect(setting, tmp_path_factory.mktemp("one") / "gradients", replicas=1)


def assert_same_bytes(ours: Path, theirs: Path) -> None:
    files = sorted(file.relative_to(theirs) for file in theirs.rglob("*.npy"))
    assert len(files) == 12  # labels, and margins and features or class scores and class features, of four splits
    for file in files:
        assert (ours / file).read_bytes() == (theirs / file).read_bytes(), file


def test_two_replicas_write_the_bytes_of_one(setting, one_replica, tmp_path):
    collect(setting, tmp_path / "gradients", replicas=2)
    assert_same_bytes(tmp_path / "gradients", one_replica.folder)


def test_what_a_kill_left_half_written_is_removed(setting, one_replica, tmp_path):
    folder = tmp_path / "gradients"
    shutil.copytree(one_replica.folder, folder)
    for left in (folder / ".parts" / ".films-train-0.npz.ab.tmp", folder / "films" / ".train.cd.tmp" / "margins.npy"):
        left.parent.mkdir(parents=True)
        left.write_bytes(b"torn")
    collect(setting, folder, replicas=1)
    assert_same_bytes(folder, one_replica.folder)
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize("shards", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sharded_replicas_give_the_same_features(setting, one_replica, tmp_path, shards, wide_cluster):
    store = collect(setting, tmp_path / "gradients", replicas=4 // shards, shards=shards)
    for task in store.tasks:
        for split in ("train", "validation"):
            ours, theirs = store[task, split], one_replica[task, split]
            assert np.array_equal(ours.labels, theirs.labels)
            np.testing.assert_allclose(ours.margins, theirs.margins, rtol=1e-4, atol=1e-5)
            difference = np.linalg.norm(ours.features - theirs.features, axis=1)
            assert (difference < 1e-4 * np.linalg.norm(theirs.features, axis=1)).all()


def actor_processes(title: str) -> list[int]:
    """Processes of this test's Ray session with such a title."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cmdline").read_text().startswith(title):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("shards", "title"),
    [
        (1, "ray::GradientReplica"),
        pytest.param(2, "ray::ShardActor", marks=pytest.mark.slow),
        pytest.param(2, "ray::ShardedReplica", marks=pytest.mark.slow),
    ],
)
def test_killed_actor_leaves_no_trace_in_the_store(setting, one_replica, tmp_path, shards, title, wide_cluster):
    undisturbed = one_replica
    if shards > 1:
        undisturbed = collect(setting, tmp_path / "undisturbed", replicas=2, shards=shards)
    parts = tmp_path / "killed" / ".parts"
    before = set(actor_processes(title))
    killed, kept = [], {}

    def kill_one() -> None:
        while not any(parts.glob("*.npz")):
            time.sleep(0.01)
        kept.update({path: path.stat().st_mtime_ns for path in parts.glob("*.npz")})
        victims = set(actor_processes(title)) - before
        os.kill(victims.pop(), signal.SIGKILL)
        killed.append(True)

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    written: dict[Path, int] = {}

    def watch() -> None:
        while thread.is_alive() or parts.is_dir():
            for path in kept:
                try:
                    written[path] = path.stat().st_mtime_ns
                except FileNotFoundError:
                    return
            time.sleep(0.02)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    collect(setting, tmp_path / "killed", replicas=2, shards=shards)
    thread.join()
    watcher.join(10)
    assert killed, "the pass ended before an actor could be killed"
    assert all(kept[path] == stamp for path, stamp in written.items()), "a finished unit was computed again"
    assert_same_bytes(tmp_path / "killed", undisturbed.folder)


@pytest.mark.chaos
@pytest.mark.slow
def test_node_that_goes_away_leaves_no_trace_in_the_store(setting, one_replica, tmp_path):
    script = Path(__file__).parent / "node_loss.py"
    _, spec = setting
    source = Path(spec.source).parent
    done = subprocess.run(
        [sys.executable, str(script), str(source), str(tmp_path / "gradients")],
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "node removed with" in done.stdout
    assert_same_bytes(tmp_path / "gradients", one_replica.folder)


def test_damage_is_named_on_reading_and_that_split_alone_computed_again(setting, one_replica, tmp_path, capfd):
    import shutil

    from ray_ensemble.errors import InputError

    folder = tmp_path / "gradients"
    shutil.copytree(one_replica.folder, folder)
    file = folder / "films" / "train" / "features.npy"
    content = bytearray(file.read_bytes())
    content[-7] ^= 4
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"films/train/features\.npy: damaged"):
        GradientStore.open(folder)["films", "train"]
    GradientStore.open(folder)["films", "validation"]
    (folder / "options" / "validation" / "labels.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(InputError, match=r"options/validation/labels\.npy: damaged"):
        GradientStore.open(folder)["options", "validation"]
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}
    collect(setting, folder, replicas=1)
    assert_same_bytes(folder, one_replica.folder)
    again = {
        path.parent.relative_to(folder).as_posix() for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp
    }
    assert again == {"films/train", "options/validation"}
    told = capfd.readouterr().out
    assert "recomputing films/train" in told
    assert "recomputing options/validation" in told


def test_store_of_other_settings_is_named_and_replaced(setting, one_replica, tmp_path, capfd):
    import shutil

    folder = tmp_path / "gradients"
    shutil.copytree(one_replica.folder, folder)
    collect(setting, folder, replicas=1, seed=5)
    assert "made with seed = 0, not 5" in capfd.readouterr().out
    assert GradientStore.open(folder).info["seed"] == 5
