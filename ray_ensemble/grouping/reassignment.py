"""Batches of moves for many tasks: each task goes to the group whose β already serves it best.

Trying single moves costs two fits each, and of n tasks and m groups there are n·m. But how a task would fare beside a group
that it is not in can be predicted from that group's β without a fit: one product of the task's features with m vectors. So a
round costs m fits and moves many tasks, as Lloyd's algorithm does with means (for models: Ghosh et al. 2020, arXiv 2006.04088).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from ray_ensemble.estimator.estimator import LOSS_TIE_BREAK, Estimator, Group, Metric
from ray_ensemble.estimator.features import TaskFeatures, validation_halves
from ray_ensemble.estimator.fit import softplus
from ray_ensemble.grouping.objective import task_values
from ray_ensemble.grouping.partitions import MARGIN, Matrix, Partition, from_labels, to_labels

ROUNDS = 12


@dataclass(frozen=True)
class Reassigned:
    """The partition, and the operations of the fits that were made for its βs alone."""

    partition: Partition
    flops: int


def reassign(
    partition: Partition, estimator: Estimator, objective: Callable[[Partition], float], metric: Metric
) -> Reassigned:
    """Move tasks to the groups that serve them best, in batches, as long as that lowers the objective.

    Where a batch does not, half of it is tried, those tasks with the most to gain. The number of groups stays, and no
    group is left empty. At most 12 batches are tried. Deterministic in its arguments.
    """
    best, flops = objective(partition), 0
    fitted: dict[Group, NDArray[np.float64]] = {}
    tried = 0
    while tried < ROUNDS:
        for group in partition:
            if group not in fitted:
                fit, _ = estimator.fit(group)
                fitted[group] = fit.beta
                flops += fit.flops
        fitted = {group: fitted[group] for group in partition}
        moves = _moves(partition, estimator, np.stack(list(fitted.values())), metric)
        found = None
        while moves and found is None and tried < ROUNDS:
            candidate = _moved(partition, moves)
            tried += 1
            value = objective(candidate)
            if value < best - MARGIN:
                found, best = candidate, value
            moves = moves[: len(moves) // 2]
        if found is None:
            break
        partition = found
    return Reassigned(partition, flops)


def predicted_values(task: TaskFeatures, betas: Matrix, metric: Metric) -> NDArray[np.float64]:
    """What a task would add to the objective under each of m βs, fitted without it: (m,) float64; `betas` is (m, d).

    Over the examples that the search looks at: the search half of its validation data and its training examples, which are
    held out here. As `estimate_held_out` does for a β that was fitted with the task.
    """
    half = validation_halves(len(task.validation_labels))[0]
    changes = task.validation_features[half] @ betas.T  # (v, K, m)
    scores = task.validation_scores[half][:, :, None] + changes
    labels = task.validation_labels[half]
    held_out = -log_softmax(scores, axis=1)[np.arange(half.size), labels]  # (v, m)
    margins = task.train_margins[:, None] + task.train_features @ betas.T  # (M, m)
    training = softplus(np.logaddexp.reduceat(-margins, task.starts, axis=0))  # (N, m)
    count, extra = half.size, task.examples
    loss = (held_out.sum(axis=0) + training.sum(axis=0)) / (count + extra)
    if metric == "loss":
        return np.asarray(loss)
    hits = (scores.argmax(axis=1) == labels[:, None]).sum(axis=0).astype(np.float64)
    if len(margins) < extra * (
        scores.shape[1] - 1
    ):  # one margin against several labels does not tell the largest score
        accuracy = hits / count
    else:
        accuracy = (hits + (np.minimum.reduceat(margins, task.starts, axis=0) > 0).sum(axis=0)) / (count + extra)
    return np.asarray(1.0 - accuracy + LOSS_TIE_BREAK * loss)


def _moves(partition: Partition, estimator: Estimator, betas: Matrix, metric: Metric) -> list[tuple[int, int]]:
    """Pairs of a task and the index of the group that is predicted to serve it better, the largest gain first."""
    labels = np.array(to_labels(partition))
    values = np.stack([predicted_values(task, betas, metric) for task in estimator.features])  # (n, m)
    own = task_values(estimator, partition, metric)
    values[np.arange(len(labels)), labels] = own
    gains = own - values.min(axis=1)
    order = np.argsort(-gains, kind="stable")
    return [(int(task), int(values[task].argmin())) for task in order if gains[task] > MARGIN]


def _moved(partition: Partition, moves: list[tuple[int, int]]) -> Partition:
    """The partition after the moves, but for those that would leave a group empty."""
    labels, sizes = to_labels(partition), [len(group) for group in partition]
    for task, group in moves:
        if sizes[labels[task]] > 1:
            sizes[labels[task]] -= 1
            sizes[group] += 1
            labels[task] = group
    return from_labels(labels)
