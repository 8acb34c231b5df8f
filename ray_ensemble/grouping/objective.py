"""The objective of a partition: mean over tasks of the estimated loss, plus a price per adapter (DESIGN section 2.5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ray_ensemble.estimator.estimator import LOSS_TIE_BREAK, Estimator, Group, Half, Metric
from ray_ensemble.estimator.predict import Estimate
from ray_ensemble.grouping.partitions import Partition


@dataclass(frozen=True)
class Paired:
    """Mean over tasks of the difference of two partitions' task values, and the standard error of that mean."""

    difference: float
    standard_error: float


def objective(estimator: Estimator, partition: Partition, metric: Metric, price: float, half: Half = "search") -> float:
    """`Estimator.objective` + `price` · number of groups; `price` is in units of the objective (nats, or accuracy)."""
    return estimator.objective(partition, metric, half) + price * len(partition)


def task_values(
    estimator: Estimator, partition: Iterable[Iterable[int]], metric: Metric, half: Half = "search"
) -> NDArray[np.float64]:
    """What each task adds to the objective, before the division by n and without the price: (n,) float64.

    The loss in nats, or for `accuracy` 1 − accuracy + 1e-4 · loss, as in `Estimator.objective`.
    """
    return np.array([_value(found, metric) for found in estimator.tasks(partition, half)])


def group_values(estimator: Estimator, group: Group, metric: Metric) -> NDArray[np.float64]:
    """The `task_values` of a group's members in the order of their indices, on the search half: (members,) float64."""
    return np.array([_value(found, metric) for found in estimator.group(group).search])


def group_value(estimator: Estimator, metric: Metric) -> Callable[[Group], float]:
    """The function that maps a group to the sum of `task_values` over its members, on the search half."""

    def value(group: Group) -> float:
        return float(group_values(estimator, group, metric).sum())

    return value


def paired(values: NDArray[np.float64], reference: NDArray[np.float64]) -> Paired:
    """Compare two partitions on the same n tasks: mean of `values − reference`, and its sd/√n (ddof 1; 0 for one task).

    What tasks have in common (some are hard under any partition) falls out of the difference, so this is much less than the
    standard error of either mean. Different shapes are a `ValueError`.
    """
    if values.shape != reference.shape or values.ndim != 1 or values.size == 0:
        raise ValueError(f"values {values.shape} and {reference.shape} are not of the same tasks")
    differences = values - reference
    spread = float(differences.std(ddof=1)) if differences.size > 1 else 0.0
    return Paired(float(differences.mean()), spread / float(np.sqrt(differences.size)))


def _value(found: Estimate, metric: Metric) -> float:
    return found.loss if metric == "loss" else 1.0 - found.accuracy + LOSS_TIE_BREAK * found.loss
