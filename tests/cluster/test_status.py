"""The status of a run, told from its folder at every point that a run can be found at."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from ray_ensemble import Job
from ray_ensemble.cli import main
from ray_ensemble.config import dump_config, load_config
from ray_ensemble.errors import InputError
from ray_ensemble.files import write_json
from ray_ensemble.run_folder import LEASE_SECONDS, STAGES
from ray_ensemble.status import run_status, status_text


@pytest.fixture(scope="module")
def begun(whole_job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as far as it comes without Ray: its data are read."""
    return Job.from_yaml(whole_job).tasks(tmp_path_factory.mktemp("begun") / "run").folder


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    return shutil.copytree(begun, tmp_path / "run")


def hold(run: Path, age: float, host: str = "elsewhere") -> None:
    write_json(run / "lease.json", {"host": host, "pid": 7, "started": "1", "heartbeat": time.time() - age})


@pytest.mark.parametrize("there", [False, True])
def test_what_is_no_run_folder_is_refused(tmp_path, there, capsys):
    folder = tmp_path / "foreign"
    if there:
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    assert main(["status", str(folder)]) == 2
    assert f"{folder}: {'not a run folder' if there else 'no such run folder'}" in capsys.readouterr().err


def test_a_damaged_manifest_is_named(run):
    (run / "manifests" / "tasks.json").write_text('{"files": ')
    with pytest.raises(InputError, match=r"manifests/tasks\.json"):
        run_status(run)


@pytest.mark.parametrize(("name", "text"), [("manifests/tasks.json", "{}"), ("tasks.json", "[]"), ("tasks.json", "{}")])
def test_a_file_of_another_shape_is_named(run, name, text):
    (run / name).write_text(text)
    with pytest.raises(InputError, match=rf"{name}: there is no '(files|tasks)' in this"):
        run_status(run)


@pytest.mark.parametrize("scales", [[1.0], [0.5, 1.0]])
def test_trials_of_a_search_at_several_scales_are_all_counted(run, scales):
    config = load_config(run / "config.yaml")
    search = config.search.model_copy(update={"regularization_scales": scales, "trials": 4})
    (run / "config.yaml").write_text(dump_config(config.model_copy(update={"search": search})))
    for scale in scales:
        for trial in range(3):
            folder = run / "search" / ("" if len(scales) == 1 else f"scale-{scale:g}") / "tune" / f"trial-{trial}"
            folder.mkdir(parents=True)
            (folder / "result.json").write_text("{}\n")
    found = run_status(run)["search"]
    assert (found["done"], found["total"]) == (3 * len(scales), 4 * len(scales))


def test_a_run_that_nobody_owns_waits_to_be_started(run):
    found = run_status(run)
    assert (found["state"], found["stage"], found["owner"]) == ("stopped", "gradients", None)
    assert [stage for stage in STAGES if found["stages"][stage]["whole"]] == ["plan", "tasks"]
    assert found["waits_for"] == "the same command to be started again; it goes on with gradients"
    assert found["gradients"] == {
        "unit": "examples",
        "done": 0,
        "total": 4 * (24 + 8),
        "per_second": None,
        "seconds_left": None,
    }
    assert "training" not in found


@pytest.mark.parametrize(("age", "state"), [(5.0, "running"), (LEASE_SECONDS + 30, "stopped")])
def test_an_owner_elsewhere_lives_by_its_heartbeat(run, age, state):
    hold(run, age)
    found = run_status(run)
    assert found["state"] == state
    assert found["owner"]["host"] == "elsewhere"
    assert found["owner"]["heartbeat_age"] == pytest.approx(age, abs=2)
    assert ("the owner is gone" in status_text(found)) == (state == "stopped")


def test_a_lease_that_was_cut_short_is_nobodys(run):
    (run / "lease.json").write_text('{"host": "a", "pi')
    assert run_status(run)["owner"] is None


def test_parts_of_gradients_are_counted_and_give_a_rate(run):
    """24 training examples of one split are put together; of the others 8 came at 0 s, 4 at 2 s, 6 at 5 s."""
    hold(run, 1)
    store = run / "gradients"
    (store / "films" / "train").mkdir(parents=True)
    write_json(store / "films" / "train" / "info.json", {})
    (store / ".parts").mkdir()
    now = time.time()
    parts = [
        ("films-train-aaaaaaaaaaaa-0", "margins", 24, 100),  # its split is whole
        ("films-validation-aaaaaaaaaaaa-0", "class_scores", 8, 5),
        ("phones-train-bbbbbbbbbbbb-0", "margins", 4, 3),
        ("phones-train-bbbbbbbbbbbb-1", "margins", 6, 0),
    ]
    for name, key, count, age in parts:
        file = store / ".parts" / f"{name}.npz"
        np.savez(file, **{key: np.zeros((count, 2)), "features": np.zeros((count, 3))})
        os.utime(file, (now - age, now - age))
    (store / ".parts" / "phones-train-bbbbbbbbbbbb-2.npz").write_bytes(b"PK\x03\x04 cut off")
    found = run_status(run)["gradients"]
    assert (found["done"], found["total"]) == (24 + 8 + 4 + 6, 128)
    assert found["per_second"] == pytest.approx((4 + 6) / 5, rel=0.01)
    assert found["seconds_left"] == pytest.approx((128 - 42) / 2, abs=1)
    assert run_status(run)["waits_for"] == "86 of 128 examples"


def test_max_examples_lowers_the_total(run):
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("max_examples: null", "max_examples: 10"))
    assert run_status(run)["gradients"]["total"] == 4 * (10 + 8)


def test_a_missing_file_of_a_whole_stage_is_told(run):
    (run / "tasks.json").unlink()
    found = run_status(run)
    assert found["stage"] == "tasks"
    assert found["stages"]["tasks"]["missing"] == ["tasks.json"]
    assert "tasks.json is missing" in found["waits_for"]


@pytest.mark.ray
def test_a_finished_run(finished_run, capsys):
    assert main(["status", str(finished_run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["stage"], found["waits_for"], found["failed"]) == ("finished", None, None, {})
    for what, total in (("gradients", 128), ("search", 4)):
        assert (found[what]["done"], found[what]["total"], found[what]["seconds_left"]) == (total, total, None)
    adapters = found["training"]["adapters"]
    groups = json.loads((finished_run / "partition.json").read_text())["groups"]
    assert set(adapters) == {*(f"group-{g}" for g in range(len(groups))), "qlora_all"}
    assert all(adapter["done"] == adapter["total"] for adapter in adapters.values())
    assert main(["status", str(finished_run)]) == 0
    assert "report     whole" in capsys.readouterr().out


@pytest.mark.ray
def test_a_run_in_training(finished_run, tmp_path):
    """One adapter is done, one is at step 5 of its log with a torn row, and the rest wait; then one fails for good."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    for stage in STAGES[STAGES.index("train") :]:
        (run / "manifests" / f"{stage}.json").unlink()
    shutil.rmtree(run / "adapters")
    shutil.rmtree(run / "baselines")
    kept, other, *rest = sorted((run / "trained").iterdir())
    rows = (other / "train.jsonl").read_text().splitlines()[:5]
    log = run / "checkpoints" / "pack" / "logs" / f"{other.name}.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("\n".join([*rows, '{"step": 5, "lo']))
    for folder in (other, *rest):
        shutil.rmtree(folder)
    hold(run, 1)
    found = run_status(run)
    training = found["training"]
    finished = json.loads((kept / "result.json").read_text())["steps"]
    assert (found["state"], found["stage"]) == ("running", "train")
    assert training["done"] == finished + 5
    assert training["total"] == sum(
        json.loads((finished_run / "manifests" / "train.json").read_text())["steps"].values()
    )
    assert training["adapters"][other.name] == {"done": 5, "total": None, "loss": json.loads(rows[-1])["loss"]}
    speed = 5 / sum(json.loads(row)["seconds"] for row in rows)
    assert training["per_second"] == pytest.approx(speed, rel=0.01, abs=0.001)
    assert training["seconds_left"] == pytest.approx((training["total"] - training["done"]) / speed, abs=1)
    write_json(
        run / "failures.json", {"status": "partial", "trained": [], "failed": {"group-0": "the loss is no number"}}
    )
    (run / "lease.json").unlink()
    assert run_status(run)["state"] == "partial"
    assert "group-0 failed: the loss is no number" in status_text(run_status(run))
