"""The training budget is part of the estimate: λ stands for the optimiser steps that a group will get.

A converged fit promises what few steps do not reach. Descent on a linearised model that stops after t steps shrinks
the direction of curvature h by 1 − (1 − ηh)ᵗ, which is close to the ridge factor h/(h + 2λ) at 2λ ∝ 1/(ηt) (Friedman
and Popescu 2004; Ali, Kolter and Tibshirani 2019, arXiv 1810.10082). So λ of a group S = λ_ref · steps_ref / steps_S,
and the one unknown, λ_ref at the steps of all tasks together, which also carries the learning rate, is chosen on
validation data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ray_ensemble.config import Sampling, TrainingConfig
from ray_ensemble.estimator.features import FloatArray, IntArray, TaskFeatures, validation_halves
from ray_ensemble.estimator.fit import Fit, fit_path
from ray_ensemble.estimator.loss import Vector
from ray_ensemble.estimator.predict import estimate_held_out

GRID_DECADES = (1.0, -6.0)  # λ_ref relative to the mean squared norm of the features, large to small
GRID_STEPS_PER_DECADE = 2
PATH_TOLERANCE = 1e-6  # of a fit's objective, far below the differences between grid points
PATIENCE = 2  # grid points without a better loss before the path ends: small λ cost most and only overfit
SAMPLED_GROUPS = 32  # of each kind of group vote on λ at most, so that the cost is bounded for any number of tasks


@dataclass(frozen=True)
class RegularizationChoice:
    """λ_ref, the mean estimated losses (nats) along the part of `grid` that was walked, and the operations spent."""

    value: float
    grid: tuple[float, ...]
    losses: tuple[float, ...]
    flops: int


def total_examples(features: Sequence[TaskFeatures], members: Sequence[int]) -> int:
    """Number of examples that a training on a group has; gradients may be of a part of them (`gradients.max_examples`)."""
    return sum(features[task].training_examples for task in members)


def group_regularization(
    reference: float, training: TrainingConfig, features: Sequence[TaskFeatures], members: Sequence[int]
) -> float:
    """λ of a group = `reference` · steps of all tasks together / steps of the group; `reference` is λ_ref."""
    steps = training.steps(total_examples(features, members))
    steps_ref = training.steps(total_examples(features, range(len(features))))
    return reference * steps_ref / steps


def first_rows(features: Sequence[TaskFeatures], members: Sequence[int]) -> list[int]:
    """The row of a group's stacked training rows at which each member begins."""
    sizes = [len(features[task].train_features) for task in members]
    return [sum(sizes[:place]) for place in range(len(sizes))]


def stack_group(
    features: Sequence[TaskFeatures], members: Sequence[int], sampling: Sampling = "examples"
) -> tuple[FloatArray, FloatArray, Vector, IntArray]:
    """Training rows (M, d), margins (M,), weights (N,) and first rows (N,) of a group's N examples."""
    rows = np.concatenate([features[task].train_features for task in members])
    margins = np.concatenate([features[task].train_margins for task in members])
    firsts = first_rows(features, members)
    starts = np.concatenate([features[task].starts + first for task, first in zip(members, firsts, strict=True)])
    return rows, margins, sampler_weights(features, members, sampling), starts


def sampler_weights(
    features: Sequence[TaskFeatures], members: Sequence[int], sampling: Sampling = "examples"
) -> Vector:
    """How often training on a group draws each of its N examples: (N,), sum 1, the members' examples in turn.

    With `sampling: examples` every example of a group is drawn equally often, with `tasks` every member and every example of
    it (`training.sampling`). The N examples of a member stand for all that it is trained on. Another sampler needs other
    weights, or the estimate models another training; inside a task they must not depend on the group, since its model of the
    loss is shared by groups.
    """
    sizes = np.array([features[task].examples for task in members])
    if sampling == "tasks":
        return np.repeat(1.0 / (len(members) * sizes), sizes)
    drawn = np.array([features[task].training_examples for task in members])
    return np.repeat(drawn / (drawn.sum() * sizes), sizes)


def prediction_flops(task: TaskFeatures) -> int:
    """Operations of the linearised scores of all validation examples of a task (the first label's feature is zero)."""
    examples, labels, dim = task.validation_features.shape
    return int(2 * examples * (labels - 1) * dim)


def regularization_grid(features: Sequence[TaskFeatures]) -> list[float]:
    """The values that λ_ref may have, large to small: `GRID_DECADES` about the mean squared norm of the training features."""
    norms = [np.square(task.train_features, dtype=np.float64).sum(axis=1).mean() for task in features]
    scale = float(np.mean(norms)) or 1.0  # features that are all zero predict no change at any λ
    points = round((GRID_DECADES[0] - GRID_DECADES[1]) * GRID_STEPS_PER_DECADE) + 1
    return [float(value) for value in scale * np.logspace(*GRID_DECADES, points)]


def choose_regularization(
    features: Sequence[TaskFeatures],
    training: TrainingConfig,
    subsets: Sequence[tuple[int, ...]],
    seed: int = 0,
) -> RegularizationChoice:
    """Choose λ_ref on a logarithmic grid by the estimated loss on the search half of the validation data and on the
    training examples, each left out of the fit.

    Three kinds of group vote: the affinity's sampled `subsets`, each single task, and all tasks together. Each kind
    has the same weight, and inside a kind every task has: the search compares groups of every size with λ scaled by
    their steps, so λ_ref must hold at both ends of the range; pooled pairs (subset, task) would be nearly all of one
    size and would leave the ends to extrapolation. A tie goes to the larger λ, the more cautious estimate. At most
    `SAMPLED_GROUPS` of a kind are used, drawn with `seed`. The odd half of the validation data is never looked at.
    """
    everything = tuple(range(len(features)))
    generator = np.random.default_rng(seed)
    kinds = [_sample(subsets, generator), _sample([(task,) for task in everything], generator), [everything]]
    groups = sorted({group for kind in kinds for group in kind})
    halves = [validation_halves(len(task.validation_labels))[0] for task in features]
    grid = regularization_grid(features)

    paths = {}
    for group in groups:
        path = [group_regularization(value, training, features, group) for value in grid]
        rows, margins, weights, starts = stack_group(features, group, training.sampling)
        paths[group] = fit_path(rows, margins, weights, path, starts=starts, tolerance=PATH_TOLERANCE)
    losses: list[float] = []
    flops = 0
    for _ in grid:
        by_group: dict[tuple[int, ...], Sequence[float]] = {}
        for group, fits in paths.items():
            fit: Fit = next(fits)
            by_group[group] = [
                estimate_held_out(fit, first, features[task], halves[task]).loss
                for task, first in zip(group, first_rows(features, group), strict=True)
            ]
            flops += fit.flops + sum(prediction_flops(features[task]) for task in group) // 2
        losses.append(float(np.mean([_mean_by_task(kind, by_group) for kind in kinds if kind])))
        if len(losses) - 1 - int(np.argmin(losses)) >= PATIENCE:
            break
    return RegularizationChoice(grid[int(np.argmin(losses))], tuple(grid[: len(losses)]), tuple(losses), flops)


def _sample(groups: Sequence[tuple[int, ...]], generator: np.random.Generator) -> list[tuple[int, ...]]:
    if len(groups) <= SAMPLED_GROUPS:
        return list(groups)
    return [groups[index] for index in sorted(generator.choice(len(groups), SAMPLED_GROUPS, replace=False))]


def _mean_by_task(kind: Sequence[tuple[int, ...]], losses: dict[tuple[int, ...], Sequence[float]]) -> float:
    """Mean over tasks of the mean over the groups of this kind that hold the task."""
    by_task: dict[int, list[float]] = {}
    for group in kind:
        for task, loss in zip(group, losses[group], strict=True):
            by_task.setdefault(task, []).append(loss)
    return float(np.mean([np.mean(values) for values in by_task.values()]))
