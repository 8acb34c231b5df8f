"""λ_ref from really fine-tuned subsets: the training budget as it is, where validation data can only guess at it.

The grid and the scaling to a group's steps are those of `budget`; what differs is the judge. Validation data choose the λ that
predicts best, as if training went on until it no longer helped; a few real runs tell how far training goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ray_ensemble.config import TrainingConfig
from ray_ensemble.estimator.budget import (
    PATH_TOLERANCE,
    RegularizationChoice,
    group_regularization,
    prediction_flops,
    regularization_grid,
    stack_group,
)
from ray_ensemble.estimator.features import TaskFeatures
from ray_ensemble.estimator.fit import fit_path
from ray_ensemble.estimator.predict import Estimate, estimate_task


@dataclass(frozen=True)
class Truth:
    """What fine-tuning on `members` (sorted task indices) really reached: each one's estimate on all its validation examples."""

    members: tuple[int, ...]
    reached: tuple[Estimate, ...]


def estimates_along(
    features: Sequence[TaskFeatures], training: TrainingConfig, members: Sequence[int], grid: Sequence[float]
) -> tuple[list[tuple[Estimate, ...]], int]:
    """Estimates of every member on all its validation examples for each λ_ref of `grid` (falling), and the operations spent."""
    path = [group_regularization(value, training, features, members) for value in grid]
    rows, margins, weights, starts = stack_group(features, members, training.sampling)
    found, flops = [], 0
    for fit in fit_path(rows, margins, weights, path, starts=starts, tolerance=PATH_TOLERANCE):
        found.append(
            tuple(estimate_task(fit.beta, features[i], np.arange(len(features[i].validation_labels))) for i in members)
        )
        flops += fit.flops + sum(prediction_flops(features[i]) for i in members)
    return found, flops


def calibrate_regularization(
    features: Sequence[TaskFeatures], training: TrainingConfig, truths: Sequence[Truth]
) -> RegularizationChoice:
    """The λ_ref whose estimates are nearest to what the real runs reached: least mean |estimated − true| / true loss.

    The choice's `losses` are these errors, over all (run, member). A tie goes to the larger λ. No runs are a `ValueError`.
    """
    if not truths:
        raise ValueError("calibration needs at least one real run")
    grid = regularization_grid(features)
    errors: list[list[float]] = [[] for _ in grid]
    flops = 0
    for truth in truths:
        along, spent = estimates_along(features, training, truth.members, grid)
        flops += spent
        for place, estimates in enumerate(along):
            pairs = zip(estimates, truth.reached, strict=True)
            errors[place] += [abs(guess.loss - real.loss) / real.loss for guess, real in pairs if real.loss > 0]
    means = [float(np.mean(each)) for each in errors]
    return RegularizationChoice(grid[int(np.argmin(means))], tuple(grid), tuple(means), flops)
