"""Tasks that every group is better without, those with wrong labels for one, told from the estimates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from ray_ensemble.estimator.estimator import Estimator
from ray_ensemble.grouping.objective import group_values
from ray_ensemble.grouping.partitions import Partition
from ray_ensemble.grouping.reassignment import predicted_values

ERRORS = 2.0  # standard errors beyond which a mean effect is not noise
CHANCE = 0.025  # of naming, by its own group's effect, any task that does neither good nor harm there
PARTNERS = 3  # fewer say nothing


@dataclass(frozen=True)
class Harm:
    """A task that does harm, and the evidence.

    `effect` is the mean over `partners` (all other tasks) of what the task does to a partner's estimated loss when it joins
    the partner's group: nats without it minus with it, so negative. `standard_error` is that of the mean, paired over
    partners; `better` counts the partners that are better with it.
    """

    task: str
    effect: float
    standard_error: float
    partners: int
    better: int


def harmful(estimator: Estimator, partition: Partition) -> tuple[Harm, ...]:
    """The tasks that are better kept out of every group of `partition`, the worst first; on the search half.

    A task joins each group in turn, and its own group is compared with the same without it. It is named where the mean effect
    on all other tasks is below −2 standard errors, and no group speaks for it:

    - another group that is better with it on the mean speaks for the task, since strangers to most may still have kin;
    - its own group does unless that is worse with it by more than chance among n tasks (2.5% / n, one-sided normal), since the
      search put it there;
    - neither does where the group's tasks are worse off than untrained: two tasks of noise dilute each other's.

    It is always the loss that is compared, since accuracy is coarse. Costs a fit a task, and one a group for each task that does
    not help its own; of fewer than four tasks none is judged.
    """
    if len(estimator) <= PARTNERS:
        return ()
    nothing = np.zeros((1, estimator.features[0].dim))
    untrained = np.array([predicted_values(task, nothing, "loss")[0] for task in estimator.features])
    found = []
    for task in range(len(estimator)):
        effects = _effects(task, estimator, partition, untrained)
        if effects is None:
            continue
        mean, error = float(effects.mean()), _standard_error(effects)
        if mean < -ERRORS * error:
            name = estimator.features[task].name
            found.append(Harm(name, mean, error, int(effects.size), int((effects > 0).sum())))
    return tuple(sorted(found, key=lambda harm: harm.effect))


def _effects(
    task: int, estimator: Estimator, partition: Partition, untrained: NDArray[np.float64]
) -> NDArray[np.float64] | None:
    """The effect of a task on every other one, (n − 1,); None as soon as a group speaks for it."""
    own = next(group for group in partition if task in group)
    effects = []
    for group in (own, *(other for other in partition if other is not own)):
        others = tuple(member for member in group if member != task)
        if not others:
            continue
        together = tuple(sorted((*others, task)))
        place = together.index(task)
        with_task = np.delete(group_values(estimator, together, "loss"), place)
        effect = group_values(estimator, others, "loss") - with_task
        noise = float(norm.isf(CHANCE / len(estimator))) * _standard_error(effect) if group is own else 0.0
        if effect.mean() > -noise and with_task.mean() < untrained[list(others)].mean():
            return None
        effects.append(effect)
    return np.concatenate(effects)


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / np.sqrt(values.size)) if values.size > 1 else 0.0
