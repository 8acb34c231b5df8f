"""Errors of the estimate against real fine-tuning, on points made up for it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import rankdata

from ray_ensemble.estimator import Estimate
from ray_ensemble.estimator.comparison import Point, calibrated_error, compare, fit_scale, within_spearman

LEVELS = np.array([0.3, 0.6, 0.9, 1.5, 2.0])


def made(noise: float, repeats: int = 2, seed: int = 0, scale: float = 1.0, again: float = 0.0) -> list[Point]:
    """Twelve subsets of three out of five tasks; the estimate of a change is `scale` times the truth, and noise."""
    generator = np.random.default_rng(seed)
    points = []
    subsets = [tuple(sorted(generator.choice(5, 3, replace=False).tolist())) for _ in range(30)]
    for place, subset in enumerate(list(dict.fromkeys(subsets))[:8]):
        for task in subset:
            base = Estimate(LEVELS[task] + 0.5, 0.5)
            true = LEVELS[task] + 0.1 * generator.normal()
            estimated = base.loss + scale * (true - base.loss) + noise * generator.normal()
            seeds = [Estimate(true, 0.8)]
            if place < repeats:
                seeds.append(Estimate(true + again * generator.normal(), 0.7))
            points.append(Point(subset, task, Estimate(estimated, 0.76), tuple(seeds), base))
    return points


def test_a_perfect_estimate_has_no_error():
    found = compare(made(0.0))
    assert found["loss_error"] == pytest.approx(0)
    assert found["loss_error_calibrated"] == pytest.approx(0)
    assert found["spearman"] == pytest.approx(1)
    assert found["spearman_interval"] == pytest.approx([1, 1])
    assert found["accuracy_error"] == pytest.approx(0.05)
    assert found["accuracy_error_points"] == pytest.approx(4)
    assert found["seed_to_seed"]["loss_error"] == 0
    assert found["seed_to_seed"]["accuracy_error_points"] == pytest.approx(10)
    assert found["seed_to_seed"]["reliability"] == 1


def test_calibration_takes_off_a_wrong_scale_and_nothing_else():
    points = made(0.0, scale=1.7)
    assert compare(points)["loss_error"] > 0.1
    assert calibrated_error(points) == pytest.approx(0, abs=1e-9)
    assert calibrated_error(made(0.1)) > 0.02
    assert calibrated_error(points, subsets=8) is None
    # A scale never turns the order round.
    assert fit_scale(np.array([2.0]), np.array([1.0]), np.array([1.5])) == 0.0


def test_spearman_does_not_see_the_level_of_a_task():
    points = made(0.05)
    estimated = np.array([p.estimated.loss for p in points])
    true = np.array([p.true[0].loss for p in points])
    tasks = np.array([p.task for p in points])
    found = within_spearman(estimated, true, tasks)
    assert within_spearman(estimated + 10.0 * tasks, true - 3.0 * tasks, tasks) == pytest.approx(found)
    a, b = estimated.copy(), true.copy()
    for task in range(5):
        a[tasks == task] -= a[tasks == task].mean()
        b[tasks == task] -= b[tasks == task].mean()
    assert found == pytest.approx(np.corrcoef(rankdata(a), rankdata(b))[0, 1])
    assert 0 < found < 1


def test_noise_of_seeds_is_the_ceiling():
    found = compare(made(0.0, repeats=8, again=0.2))["seed_to_seed"]
    assert found["points"] == 24
    assert found["loss_deviation"] == pytest.approx(0.2 / np.sqrt(2), rel=0.4)
    assert found["reliability"] == 0
    assert found["spearman"] < 0.9
    assert compare(made(0.0, repeats=0))["seed_to_seed"] is None


def test_nothing_to_compare_is_refused():
    with pytest.raises(ValueError, match="nothing was really fine-tuned"):
        compare([])


def test_an_accuracy_that_is_never_above_zero_has_no_relative_error():
    nothing = [
        Point(p.subset, p.task, p.estimated, tuple(Estimate(e.loss, 0.0) for e in p.true), p.base) for p in made(0.1)
    ]
    found = compare(nothing)
    assert found["accuracy_error"] is None
    assert found["seed_to_seed"]["accuracy_error"] is None
    json.dumps(found, allow_nan=False)
