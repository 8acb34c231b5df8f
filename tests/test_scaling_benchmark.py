"""The simulation of a run on many GPUs, in cases whose answers are known; and that measured parts are not measured again."""

from __future__ import annotations

import heapq
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import scaling
import scaling_measure
import scaling_model as model
from scaling_model import BASES, NO_OVERHEAD, Costs, Job, Line, Power, jobs_seconds, pool_seconds

FREE = NO_OVERHEAD
INSTANT = replace(BASES["1B"], load=0.0)

units = st.lists(st.floats(0.01, 10.0), min_size=1, max_size=40)


@given(units, st.floats(0.0, 5.0), st.floats(0.0, 1.0))
def test_one_actor_takes_the_sum_of_all_units_and_of_their_handling(seconds, start, handling):
    assert pool_seconds(seconds, 1, start, handling) == pytest.approx(start + sum(seconds) + handling * len(seconds))


@given(units, st.integers(1, 8))
def test_without_handling_a_pool_is_list_scheduling(seconds, actors):
    """And so within Graham's bound of the ideal, which no schedule beats."""
    found = pool_seconds(seconds, actors, 0.0, 0.0)
    ends = [0.0] * actors
    for unit in seconds:
        heapq.heapreplace(ends, ends[0] + unit)
    ideal = max(sum(seconds) / actors, *seconds)
    assert found == pytest.approx(max(ends))
    assert ideal - 1e-9 <= found <= (2 - 1 / actors) * ideal + 1e-9


@pytest.mark.parametrize("actors", [1, 3, 10, 100])
def test_equal_units_are_ideal_until_the_driver_is_the_bound(actors):
    """The driver takes a result every `handling` seconds at most, an actor gives one every unit + handling at most."""
    unit, handling, count = 1.0, 0.05, 2000
    found = pool_seconds([unit] * count, actors, 0.0, handling)
    assert found == pytest.approx(count * max(handling, (unit + handling) / actors), rel=0.05)
    assert pool_seconds([unit] * count, actors, 0.0, 0.0) == math.ceil(count / actors) * unit


@given(st.lists(st.tuples(st.floats(0.1, 10.0), st.integers(1, 4)), min_size=1, max_size=12), st.integers(1, 8))
def test_jobs_never_hold_more_gpus_than_there_are(jobs, gpus):
    found = jobs_seconds(jobs, gpus)
    work = sum(seconds * workers for seconds, workers in jobs)
    longest = max(seconds * max(1.0, workers / gpus) for seconds, workers in jobs)
    assert max(work / gpus, longest) - 1e-9 <= found <= sum(s * max(1.0, w / gpus) for s, w in jobs) + 1e-9
    assert jobs_seconds([(seconds, 1) for seconds, _ in jobs], 1) == pytest.approx(sum(s for s, _ in jobs))


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 20), st.integers(1, 300))
def test_one_gpu_without_overhead_does_nothing_but_work(tasks, train):
    cell = model.simulate(Job(tasks, train=train), INSTANT, 1, FREE)
    assert cell.seconds == pytest.approx(sum(stage.work for stage in cell.stages))
    assert cell.efficiency == pytest.approx(1.0)


def test_the_work_is_that_of_the_job():
    """By hand: tokens of every pass over tokens a second."""
    job, per_second = Job(10, groups=3), INSTANT.forward_tokens
    work = {stage.name: stage.work * per_second / job.tokens for stage in model.simulate(job, INSTANT, 4, FREE).stages}
    assert work["gradients"] == pytest.approx(10 * 1200 * FREE.gradient)
    assert work["train"] == pytest.approx(2 * 3 * math.ceil(2 * 1000 * 10 / 3 / 8) * 8 * FREE.training)
    assert work["ensemble"] == pytest.approx(10 * 3 * 100)
    assert work["evaluate"] == pytest.approx(10 * 6 * 200)
    assert work["search"] == 0


def test_what_the_driver_does_alone_is_amdahls_limit():
    """However many GPUs, a run takes at least its serial part, and with many it takes little more."""
    alone = 1000.0
    costs = replace(FREE, regularization=Power((1.0, 2.0), (alone, alone)))
    job = Job(50, workers=8)
    for gpus in (1, 8, 64):
        cell = model.simulate(job, INSTANT, gpus, costs)
        free = model.simulate(job, INSTANT, gpus, FREE)
        assert cell.seconds == pytest.approx(free.seconds + alone)
        work = sum(stage.work for stage in cell.stages)
        assert cell.efficiency <= work / (gpus * alone + work) + 1e-9
    assert cell.limit == "search: driver alone"


def test_the_baseline_of_one_worker_bounds_training_and_more_workers_lift_that():
    """The baseline has the steps of all groups together: training is twice as fast on many GPUs as on one, and no faster."""
    job = Job(100)
    one, many = (next(s for s in model.simulate(job, INSTANT, g, FREE).stages if s.name == "train") for g in (1, 1000))
    assert one.seconds / many.seconds == pytest.approx(2.0, rel=0.01)
    assert max(many.causes, key=lambda cause: many.causes[cause]) == "longest job"
    spread = next(s for s in model.simulate(replace(job, workers=8), INSTANT, 1000, FREE).stages if s.name == "train")
    assert many.seconds / spread.seconds == pytest.approx(8.0, rel=0.01)
    # Shared out, training ends when an even share of the work is done, where groups come out even.
    even = [Job(100, groups=8, workers=workers) for workers in (1, 0)]
    alone, shared = (next(s for s in model.simulate(j, INSTANT, 16, FREE).stages if s.name == "train") for j in even)
    assert shared.seconds == pytest.approx(shared.work / 16)
    assert alone.seconds == pytest.approx(8 * shared.seconds)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("gpus", [1, 4, 64])
def test_costs_only_make_it_slower_and_causes_are_named(base, gpus):
    costs = replace(
        FREE, handed=Line(0.001, 0.002), saved=Line(0.01), request=0.001, request_by_mb=0.001, actor=5.0, job=9.0
    )
    cell, free = (model.simulate(Job(30), BASES[base], gpus, each) for each in (costs, FREE))
    assert cell.seconds > free.seconds
    assert 0 < cell.efficiency < free.efficiency <= 1 + 1e-9
    stage, cause = cell.limit.split(": ")
    assert cause in next(s for s in cell.stages if s.name == stage).causes


def test_growth_is_read_off_the_last_points():
    power = Power((10.0, 20.0, 40.0), (1.0, 3.0, 12.0))
    assert [power.at(n) for n in (10, 15, 40, 80)] == pytest.approx([1.0, 2.0, 12.0, 48.0])


def test_lines_are_fitted_and_never_below_zero():
    found = scaling_measure.line([1.0, 2.0, 4.0], [3.0, 5.0, 9.0])
    assert (found["fixed"], found["slope"]) == pytest.approx((1.0, 2.0))
    assert min(scaling_measure.line([1.0, 2.0], [5.0, 1.0]).values()) == 0.0


def test_what_is_measured_is_not_measured_again(tmp_path, monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(scaling_measure, "PARTS", {n: lambda n=n: calls.append(n) or {"seconds": 1.0} for n in "abc"})
    monkeypatch.setattr(scaling_measure, "NEED_RAY", ())
    file = tmp_path / "scaling.json"
    scaling.main(["--json", str(file), "--only", "a"])
    scaling.main(["--json", str(file), "--only", "a", "b"])
    assert calls == ["a", "b"]
    scaling.main(["--json", str(file), "--only", "c", "--again", "a"])
    assert calls == ["a", "b", "a", "c"]
    assert set(json.loads(file.read_text())["measured"]) == {"a", "b", "c"}


def test_the_parts_without_ray_give_what_the_model_takes():
    """Real figures of the quick parts, and made-up ones for the rest: the model runs on them."""
    quick = {name: scaling_measure.PARTS[name]() for name in ("store", "requests", "merging")}
    made_up = {
        "pool": {
            "handed_out_and_taken": {"fixed": 1e-3, "slope": 1e-3},
            "saved": {"fixed": 1e-3, "slope": 1e-3},
            "one_wait_among": {"1": 1e-5, "256": 1e-3},
        },
        "weights": {"m": [2, 5], "seconds": [0.1, 0.2]},
        "evaluation": {"slope": 0.1},
        "fits": {"n": [10, 20], "regularization": [1, 2], "affinity": [1, 2], "trial": [1, 2]},
        "tune_trial": {"fixed": 1.0, "slope": 0.1},
        "actor_start": {"seconds": 5.0},
        "train_job": {"seconds": 9.0},
        "speed": {"gradient_over_forward": 2.1},
    }
    assert set(quick) | set(made_up) == set(scaling_measure.PARTS) - scaling_measure.NOT_IN_THE_MODEL
    costs = Costs.of(quick | made_up)
    assert min(costs.planned, costs.checked, costs.assembled, costs.hashed, costs.request, costs.merged.slope) > 0
    assert quick["requests"]["before"]["request_MB"] > 0
    assert Costs.of(quick | made_up, before=True).request_by_mb > 0
    assert 0 < model.simulate(Job(100), BASES["1B"], 16, costs).efficiency < 1
