"""Batches of moves for many tasks: each task goes to the group whose β already serves it best.

Trying single moves costs two fits each, and of n tasks and m groups there are n·m. But how a task would fare beside a group
that it is not in can be predicted from that group's β without a fit: one product of the task's features with m vectors. So a
round costs m fits and moves many tasks, as Lloyd's algorithm does with means (for models: Ghosh et al. 2020, arXiv 2006.04088).

Like Lloyd's, it ends where one true group is in two parts and two others are in one; no single move or swap leads out. So the two
groups that serve each other best are joined, and another one is split along the affinity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ray_ensemble.estimator.estimator import LOSS_TIE_BREAK, Estimator, Group, Metric
from ray_ensemble.estimator.features import TaskFeatures, validation_halves
from ray_ensemble.estimator.loss import softplus
from ray_ensemble.grouping.objective import task_values
from ray_ensemble.grouping.partitions import (
    MARGIN,
    Change,
    Matrix,
    Partition,
    apply,
    changes,
    from_labels,
    guided_gains,
    to_labels,
)

ROUNDS = 12
SPLITS = 3


@dataclass(frozen=True)
class Reassigned:
    """The partition, and the operations of the fits that were made for its βs alone."""

    partition: Partition
    flops: int


def reassign(
    partition: Partition,
    estimator: Estimator,
    objective: Callable[[Partition], float],
    metric: Metric,
    guide: Matrix | None = None,
) -> Reassigned:
    """Move tasks to the groups that serve them best, in batches, as long as that lowers the objective.

    Where a batch does not, half of it is tried, those tasks with the most to gain; at most 12 batches. With `guide`, a
    symmetric affinity (n, n), two groups are then joined and another is split, for the three most promising splits, and what
    comes of it by batches is kept if it is better, until nothing is. The number of groups stays, and no group is left
    empty. Deterministic in its arguments.
    """
    batches = _Batches(estimator, objective, metric)
    partition = batches.settle(partition)
    improved = True
    while improved and guide is not None:
        improved = False
        for start in _joined_and_split(partition, batches.values(partition), guide):
            candidate = batches.settle(start)
            if objective(candidate) < objective(partition) - MARGIN:
                partition, improved = candidate, True
                break
    return Reassigned(partition, batches.flops)


class _Batches:
    """Batches of moves; keeps the βs of the groups of late."""

    def __init__(self, estimator: Estimator, objective: Callable[[Partition], float], metric: Metric) -> None:
        self.flops = 0
        self._estimator, self._objective, self._metric = estimator, objective, metric
        self._fitted: dict[Group, NDArray[np.float64]] = {}

    def values(self, partition: Partition) -> Matrix:
        """What each task would add to the objective in each group, (n, m); in its own what it does."""
        for group in partition:
            if group not in self._fitted:
                fit, _ = self._estimator.fit(group)
                self._fitted[group] = fit.beta
                self.flops += fit.flops
        self._fitted = {group: self._fitted[group] for group in partition}
        betas = np.stack(list(self._fitted.values()))
        values = np.stack([predicted_values(task, betas, self._metric) for task in self._estimator.features])
        values[np.arange(len(values)), to_labels(partition)] = task_values(self._estimator, partition, self._metric)
        return values

    def settle(self, partition: Partition) -> Partition:
        """Batches from `partition` until none lowers the objective."""
        best, tried = self._objective(partition), 0
        while tried < ROUNDS:
            moves = _moves(partition, self.values(partition))
            found = None
            while moves and found is None and tried < ROUNDS:
                candidate = _moved(partition, moves)
                tried += 1
                value = self._objective(candidate)
                if value < best - MARGIN:
                    found, best = candidate, value
                moves = moves[: len(moves) // 2]
            if found is None:
                break
            partition = found
        return partition


def predicted_values(task: TaskFeatures, betas: Matrix, metric: Metric) -> NDArray[np.float64]:
    """What a task would add to the objective under each of m βs, fitted without it: (m,) float64; `betas` is (m, d).

    Over the examples that the search looks at: the search half of its validation data and its training examples, which are
    held out here. As `estimate_held_out` does for a β that was fitted with the task.
    """
    half = validation_halves(len(task.validation_labels))[0]
    changes = task.validation_features[half] @ betas.T  # (v, K, m)
    scores = task.validation_scores[half][:, :, None] + changes
    labels = task.validation_labels[half]
    held_out = np.logaddexp.reduce(scores, axis=1) - scores[np.arange(half.size), labels]  # (v, m)
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


def _moves(partition: Partition, values: Matrix) -> list[tuple[int, int]]:
    """Pairs of a task and the index of the group that is predicted to serve it better, the largest gain first."""
    labels = to_labels(partition)
    gains = values[np.arange(len(labels)), labels] - values.min(axis=1)
    order = np.argsort(-gains, kind="stable")
    return [(int(task), int(values[task].argmin())) for task in order if gains[task] > MARGIN]


def _joined_and_split(partition: Partition, values: Matrix, guide: Matrix) -> Iterator[Partition]:
    """The partition with the two groups joined that lose least by it, and another one split; most promising splits first."""
    if len(partition) < 3:
        return
    labels = to_labels(partition)
    own = values[np.arange(len(labels)), labels]
    losses = [
        [float((values[list(a), other] - own[list(a)]).sum()) for other in range(len(partition))] for a in partition
    ]
    cost = np.array(losses) + np.array(losses).T
    first, second = np.triu_indices(len(partition), 1)
    pair = int(cost[first, second].argmin())
    a, b = partition[first[pair]], partition[second[pair]]
    splits = [
        c for c in changes(partition, [len(partition) + 1], guide) if c.kind == "split" and c.first not in (a[0], b[0])
    ]
    gains = guided_gains(partition, splits, guide)
    split: set[int] = set()
    for index in np.argsort(-gains, kind="stable"):
        change = splits[int(index)]
        if change.first in split or len(change.part) == 1:
            continue
        split.add(change.first)
        yield apply(apply(partition, change), Change("merge", a[0], b[0]))
        if len(split) == SPLITS:
            return


def _moved(partition: Partition, moves: list[tuple[int, int]]) -> Partition:
    """The partition after the moves, but for those that would leave a group empty."""
    labels, sizes = to_labels(partition), [len(group) for group in partition]
    for task, group in moves:
        if sizes[labels[task]] > 1:
            sizes[labels[task]] -= 1
            sizes[group] += 1
            labels[task] = group
    return from_labels(labels)
