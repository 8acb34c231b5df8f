"""λ chosen by real runs: found again where the truth is an estimate at a known λ, and never worse than the others."""

from __future__ import annotations

import numpy as np
import pytest

from ray_ensemble.config import TrainingConfig
from ray_ensemble.estimator import (
    Estimate,
    Estimator,
    Truth,
    calibrate_regularization,
    estimate_task,
    estimates_along,
)
from ray_ensemble.estimator.budget import regularization_grid
from ray_ensemble.estimator.comparison import Point, calibrated_error
from ray_ensemble.estimator.planted import planted_tasks

TRAINING = TrainingConfig(min_steps=0)
SUBSETS = [(0, 1, 2), (1, 3, 4), (2, 4, 5), (0, 3, 5), (0, 1, 5), (1, 2, 3)]


@pytest.fixture(scope="module")
def tasks():
    return planted_tasks(6, 2, train=60, validation=61, dim=30, labels=3, seed=1)[0]


def everything(task):
    return np.arange(len(task.validation_labels))


@pytest.mark.parametrize("place", [2, 7, 13])
def test_the_budget_behind_the_truth_is_found(tasks, place):
    wanted = regularization_grid(tasks)[place]
    estimator = Estimator(tasks, TRAINING, wanted)
    truths = []
    for members in SUBSETS[:2]:
        fit, _ = estimator.fit(members)
        truths.append(Truth(members, tuple(estimate_task(fit.beta, tasks[i], everything(tasks[i])) for i in members)))
    choice = calibrate_regularization(tasks, TRAINING, truths)
    assert choice.value == wanted
    assert min(choice.losses) == choice.losses[place] < 1e-3
    assert choice.flops > 0
    with pytest.raises(ValueError, match="at least one"):
        calibrate_regularization(tasks, TRAINING, [])


def test_estimates_along_the_grid_are_those_of_each_value_alone(tasks):
    grid = regularization_grid(tasks)[::4]
    along, _ = estimates_along(tasks, TRAINING, (1, 3), grid)
    for value, estimates in zip(grid, along, strict=True):
        fit, _ = Estimator(tasks, TRAINING, value).fit((1, 3))
        for task, estimate in zip((1, 3), estimates, strict=True):
            assert estimate.loss == pytest.approx(
                estimate_task(fit.beta, tasks[task], everything(tasks[task])).loss, rel=1e-3
            )


def test_the_calibrated_error_is_of_runs_that_chose_nothing(tasks):
    """With the truth's own λ among those to choose from, the others are predicted without error; with noise they are not."""
    grid = regularization_grid(tasks)
    generator = np.random.default_rng(0)

    def points(noise: float) -> list[Point]:
        made = []
        for members in SUBSETS:
            along, _ = estimates_along(tasks, TRAINING, members, grid)
            for k, task in enumerate(members):
                path = tuple(estimates[k] for estimates in along)
                true = Estimate(path[9].loss * float(np.exp(noise * generator.normal())), path[9].accuracy)
                made.append(Point(members, task, path[2], (true,), Estimate(2.0, 0.3), path))
        return made

    assert calibrated_error(points(0.0)) == pytest.approx(0, abs=1e-9)
    noisy = points(0.1)
    assert calibrated_error(noisy) > 0.05
    alone = [Point(p.subset, p.task, p.estimated, p.true, p.base) for p in points(0.0)]
    assert calibrated_error(alone) > 0.01
