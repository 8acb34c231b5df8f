"""The search on Ray Tune: the same partition on any number of workers, after a kill, and nothing left behind."""

from __future__ import annotations

import csv
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ray_ensemble.config import JobConfig, SearchConfig
from ray_ensemble.errors import InputError, RunError
from ray_ensemble.estimator import Estimator
from ray_ensemble.estimator.planted import planted_tasks
from ray_ensemble.grouping.cases import format_partition, group_counts, parse_partition, search_cases
from ray_ensemble.grouping.fitlog import FitLog, Reference, fingerprint
from ray_ensemble.grouping.partitions import from_labels


def job(**search) -> JobConfig:
    return JobConfig.model_validate(
        {
            "model": {"source": "none"},
            "tasks": ["none"],
            "training": {"min_steps": 0},
            "search": {"groups": [2, 3, 4], "trials": 12, **search},
        }
    )


CHANGES = (
    {"seed": 1},
    {"regularization_scales": [2.0]},
    {"price": 0.1},
    {"rule": "one_standard_error"},
    {"methods": ["sdp"]},
)


@pytest.fixture(scope="module")
def planted():
    return planted_tasks(9, 3, train=60, validation=200, dim=40, seed=0)


def test_trials_are_distinct_and_every_m_and_method_has_one():
    for trials in (1, 3, 8, 9, 32):
        cases = search_cases(SearchConfig(groups=[2, 3, 4, 3], trials=trials), 10)
        assert len(cases) == trials
        assert len({(case["m"], case["method"], case["seed"]) for case in cases}) == trials
    first = search_cases(SearchConfig(groups=[2, 3, 4], trials=7), 10)
    told = {(m, way) for m in (2, 3, 4) for way in ("sdp", "spectral")}
    assert {(case["m"], case["method"]) for case in first} == told | {(None, "sdp-penalty")}


def test_one_group_and_one_each_are_tried_once():
    cases = search_cases(SearchConfig(groups=[1, 2, 5], trials=20), 5)
    assert [case["m"] for case in cases].count(1) == [case["m"] for case in cases].count(5) == 1
    assert len(search_cases(SearchConfig(groups=[1, 5], trials=20), 5)) == 2
    reversed_methods = search_cases(SearchConfig(groups=[1, 2], trials=4, methods=["sdp-penalty", "spectral"]), 5)
    assert [(case["m"], case["seed"]) for case in reversed_methods] == [(None, 0), (1, 0), (2, 0), (None, 1)]
    alone = search_cases(SearchConfig(groups=[1, 5], trials=20, methods=["sdp-penalty"]), 5)
    assert [case["m"] for case in alone] == [None]


def test_more_groups_than_tasks_is_refused_only_where_it_was_asked_for():
    with pytest.raises(InputError, match=r"search.groups: more groups than tasks: 4 groups of 3 tasks"):
        group_counts(SearchConfig(groups=[2, 4]), 3)
    assert group_counts(SearchConfig(), 3) == [2, 3]
    assert group_counts(SearchConfig(), 1) == [1]


def test_the_relaxation_is_left_to_few_tasks():
    assert {case["method"] for case in search_cases(SearchConfig(), 500)} == {"spectral"}
    with pytest.raises(InputError, match="sdp, sdp-penalty is for 120 tasks at most, these are 500; add spectral"):
        search_cases(SearchConfig(methods=["sdp", "sdp-penalty"]), 500)


def test_partitions_survive_the_table():
    partition = from_labels([0, 1, 0, 2, 11, 1])
    assert parse_partition(format_partition(partition)) == partition


def test_fit_log_keeps_whole_lines_and_belongs_to_its_inputs(planted, tmp_path):
    tasks, _ = planted
    estimator = Estimator(tasks, job().training, 0.1)
    first, second = estimator.group((0, 1)), estimator.group((2,))
    log = FitLog(tmp_path / "fits.jsonl", "inputs")
    assert log.reference is None
    log.start(Reference(0.1, 7))
    log.add([first, second, first])
    with log.path.open("a") as stream:
        stream.write('{"members": [3')
    again = FitLog(log.path, "inputs")
    assert again.known == {(0, 1): first, (2,): second}
    assert again.reference == Reference(0.1, 7)
    again.start(again.reference)
    assert len(log.path.read_text().splitlines()) == 3
    assert FitLog(log.path, "other inputs").known == {}


def test_fingerprint_sees_every_input(planted):
    tasks, _ = planted
    same = fingerprint(tasks, job())
    assert fingerprint(planted_tasks(9, 3, train=60, validation=200, dim=40, seed=0)[0], job()) == same
    assert fingerprint(tasks[::-1], job()) != same
    assert len({same, *(fingerprint(tasks, job(**change)) for change in CHANGES)}) == len(CHANGES) + 1
    assert fingerprint(planted_tasks(9, 3, train=60, validation=200, dim=40, seed=1)[0], job()) != same


def living_actors() -> set[str]:
    import ray

    return {a["ActorID"] for a in ray._private.state.actors().values() if a["State"] not in ("DEAD",)}


@pytest.mark.ray
def test_search_finds_the_planted_groups_and_says_so(planted, ray_cluster, tmp_path, capfd):
    from ray.util import placement_group_table

    from ray_ensemble.grouping import run_search

    tasks, membership = planted
    before = living_actors()  # Ray Train leaves one in a cluster that it has been used in
    seen = []
    result = run_search(tasks, job(), tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert result.partition == from_labels(membership)
    assert seen[-1] == (12, 12)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert capfd.readouterr().out == ""

    written = json.loads((tmp_path / "partition.json").read_text())
    assert written["groups"] == [
        ["task-0", "task-3", "task-6"],
        ["task-1", "task-4", "task-7"],
        ["task-2", "task-5", "task-8"],
    ]
    assert written["m"] == 3
    assert list(written["estimates"]) == [task.name for task in tasks]
    estimator = Estimator(tasks, job().training, written["regularization"])
    assert written["objective"] == pytest.approx(estimator.objective(result.partition, "loss", "report"))
    assert written["search_objective"] == pytest.approx(estimator.objective(result.partition, "loss", "search"))
    for reference in written["references"].values():
        assert reference["search_objective"] > written["search_objective"]
    assert [row["m"] for row in written["by_m"]] == [2, 3, 4]
    assert all(row["search_objective"] <= row["mean"] <= row["worst"] for row in written["by_m"])
    assert (written["rule"], written["price"], written["harmful"]) == ("best", 0.0, [])
    assert [row["trials"] for row in written["by_m"]] == [
        sum(1 for row in csv.DictReader((tmp_path / "search" / "trials.csv").open()) if row["m"] == m) for m in "234"
    ]

    found = json.loads((tmp_path / "affinity.json").read_text())
    assert (found["subsets"], found["seed"]) == (50, 0)
    assert found["symmetric"] == [list(column) for column in zip(*found["symmetric"], strict=True)]
    assert found["values"] != [list(column) for column in zip(*found["values"], strict=True)]
    rows = list(csv.DictReader((tmp_path / "search" / "trials.csv").open()))
    assert len(rows) == 12
    assert {"m", "seed", "method", "objective", "accuracy", "seconds", "fits"} <= set(rows[0])
    assert min(float(row["objective"]) for row in rows) == written["search_objective"]
    assert sum(1 for _ in (tmp_path / "search" / "tune").glob("*/result.json")) == 12

    assert all(group["state"] == "REMOVED" for group in placement_group_table().values())
    deadline = time.monotonic() + 10
    while living_actors() - before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert living_actors() <= before


@pytest.mark.ray
def test_one_trial_at_a_time_or_two_give_the_same_bytes(planted, ray_cluster, tmp_path):
    from ray_ensemble.grouping import run_search

    tasks, _ = planted
    config = job(objective="accuracy", trials=6)
    for name, concurrency in (("one", 1), ("two", None)):
        run_search(tasks, config, tmp_path / name, concurrency=concurrency)
    for name in ("partition.json", "affinity.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.ray
def test_a_failing_trial_is_told(planted, ray_cluster, tmp_path, monkeypatch):
    from ray_ensemble.estimator.features import TaskFeatures
    from ray_ensemble.grouping import run_search

    class Broken(TaskFeatures):
        def __reduce__(self):
            return (explode, ())

    monkeypatch.setattr("ray_ensemble.grouping.search.TRIAL_RETRIES", 0)
    tasks = [Broken(**vars(task)) for task in planted[0]]
    with pytest.raises(RunError, match="search trials failed"):
        run_search(tasks, job(trials=1), tmp_path)
    assert not (tmp_path / "partition.json").exists()


def explode():
    raise OSError("this node cannot read its inputs")


KILLED = """
import pickle, sys
from pathlib import Path
import ray
from ray_ensemble.grouping import run_search
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
tasks, config = pickle.loads(Path(sys.argv[2]).read_bytes())
run_search(tasks, config, Path(sys.argv[3]), concurrency=1, progress=lambda done, total: print(done, flush=True))
print("whole", flush=True)
"""


@pytest.mark.ray
@pytest.mark.chaos
@pytest.mark.slow
def test_a_killed_search_goes_on_to_the_same_partition(ray_cluster, tmp_path):
    """SIGKILL to the driver in mid-search; the trials that were whole are not run again."""
    import ray

    from ray_ensemble.grouping import run_search

    tasks, _ = planted_tasks(12, 3, train=80, validation=200, dim=80, seed=5)
    config = job(trials=12)
    (tmp_path / "inputs").write_bytes(pickle.dumps((tasks, config)))
    folder = tmp_path / "killed"
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", KILLED, address, str(tmp_path / "inputs"), str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as driver:
        assert driver.stdout is not None
        for line in driver.stdout:
            assert line.strip() != "whole"
            if int(line) >= 5:
                break
        time.sleep(1.5)  # Tune writes its own state once a second
        driver.send_signal(signal.SIGKILL)
        said = driver.stdout.read()
    assert "whole" not in said
    assert not (folder / "partition.json").exists()
    known = len((folder / "search" / "fits.jsonl").read_text().splitlines())
    before = {path: path.read_bytes() for path in (folder / "search" / "tune").glob("*/result.json")}
    assert known > 50

    seen = []
    resumed = run_search(tasks, config, folder, progress=lambda done, _: seen.append(done))
    assert seen[0] > 3
    assert sum(bool(text) and path.read_bytes() == text for path, text in before.items()) >= 3
    fresh = run_search(tasks, config, tmp_path / "fresh")
    assert (resumed.partition, resumed.fits, resumed.flops) == (fresh.partition, fresh.fits, fresh.flops)
    assert (folder / "partition.json").read_bytes() == (tmp_path / "fresh" / "partition.json").read_bytes()


@pytest.mark.slow
@pytest.mark.ray
def test_several_regularisations_are_searched_and_the_lowest_objective_wins(planted, ray_cluster, tmp_path):
    from ray_ensemble.grouping import run_search

    tasks, _ = planted
    scales, alone = [0.1, 1.0, 10.0], {}
    for scale in scales:
        found = run_search(tasks, job(trials=4, regularization_scales=[scale]), tmp_path / f"{scale}")
        alone[found.search_objective] = found
    told: list[tuple[int, int]] = []
    settings = job(trials=4, regularization_scales=scales)
    together = run_search(tasks, settings, tmp_path / "all", progress=lambda done, total: told.append((done, total)))
    best = alone[min(alone)]
    assert (together.groups, together.regularization) == (best.groups, best.regularization)
    assert together.search_objective == best.search_objective
    assert (together.trials, together.fits) == (12, sum(found.fits for found in alone.values()))
    assert told[-1] == (12, 12)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    with (tmp_path / "all" / "search" / "trials.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {float(row["regularization"]) for row in rows} == {found.regularization for found in alone.values()}
    # The same again is read from its files.
    assert run_search(tasks, settings, tmp_path / "all").to_json() == together.to_json()
