"""A group's loss to second order without a pass over its examples: the models of its tasks, added up.

A task's loss about its own fit is a quadratic `Model`. The loss of a group is the sum of its tasks' losses, each with the
share of the examples that the sampler draws from the task, so its model is the same sum of d×d matrices and d-vectors. Its
minimum is where the group's fit starts and its Hessian the preconditioner: both follow from the group alone, whatever was
fitted before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ray_ensemble.config import Sampling
from ray_ensemble.estimator.budget import sampler_weights, stack_group
from ray_ensemble.estimator.features import TaskFeatures
from ray_ensemble.estimator.fit import Model, loss_model
from ray_ensemble.estimator.loss import Vector


def task_model(features: Sequence[TaskFeatures], task: int, regularization: float) -> tuple[Model, int]:
    """The loss of a task to second order about its own fit with λ = `regularization`, and the operations spent."""
    rows, margins, weights, starts = stack_group(features, (task,))
    return loss_model(rows, margins, weights, regularization, starts)


def sampler_shares(features: Sequence[TaskFeatures], members: Sequence[int], sampling: Sampling = "examples") -> Vector:
    """Share of the examples of a group that the sampler draws from each member, sum 1."""
    firsts = np.cumsum([0] + [features[task].examples for task in members[:-1]])
    shares: Vector = np.add.reduceat(sampler_weights(features, members, sampling), firsts)
    return shares


def sum_models(models: Iterable[Model], shares: Sequence[float] | Vector) -> Model:
    """The model of a loss that is the sum of `shares` times the modelled losses; one of each at least."""
    hessian: Vector | None = None
    slope: Vector | None = None
    for model, share in zip(models, shares, strict=True):
        scaled = np.multiply(model.hessian, share, dtype=np.float64)
        hessian = scaled if hessian is None else np.add(hessian, scaled, out=hessian)
        slope = share * model.slope if slope is None else slope + share * model.slope
    if hessian is None or slope is None:
        raise ValueError("a sum of no models")
    return Model(hessian, slope)
