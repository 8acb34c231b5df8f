"""Which task helps which: mean estimates over sampled subsets (Li et al. 2025, section 3.2; DESIGN section 2.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_ensemble.config import EstimatorConfig
from ray_ensemble.estimator.estimator import Estimator, Group, Metric
from ray_ensemble.estimator.features import TaskFeatures
from ray_ensemble.estimator.similarity import cosines

Matrix = NDArray[np.float64]

COVER_TASKS = 50  # up to this many tasks every pair is covered, even where that takes more subsets than asked for
SUBSETS_PER_TASK = 8  # above that, how many subsets hold each task at least, or most rows of T would be empty


@dataclass(frozen=True, eq=False)
class Affinity:
    """T and how it was sampled.

    `values[i, j]` (n, n) float64 is the mean estimated performance of task i over the subsets that hold i and j, the
    larger the better (−loss in nats, or accuracy); `values[i, i]` the mean over the subsets that hold i. It is not
    symmetric. A pair that no subset holds has what gradient similarity predicts (`affinity`), or i's own mean, and a
    standard error of NaN, as has a pair held once.
    """

    tasks: tuple[str, ...]
    values: Matrix
    standard_errors: Matrix
    subsets: tuple[Group, ...]
    subset_size: int
    metric: Metric
    seed: int

    def symmetric(self) -> Matrix:
        """The matrix to cluster: (n, n), symmetric, diagonal zero; positive where two tasks help each other.

        Tasks differ in level (a loss of .2 or of 2) and that says nothing about partners, so each row's mean over j ≠
        i is taken off first; then the two directions are averaged. Zero is thus the effect of an average partner, and
        the diagonal is zero so that a task alone has density zero. Differences of scale between tasks are kept: the
        objective, a mean of losses, weighs them so.
        """
        n = len(self.tasks)
        if n == 1:
            return np.zeros((1, 1))
        away = ~np.eye(n, dtype=bool)
        means = np.where(away, self.values, 0.0).sum(axis=1, keepdims=True) / (n - 1)
        centred = np.where(away, self.values - means, 0.0)
        return (centred + centred.T) / 2.0

    def to_json(self) -> dict[str, Any]:
        """The content of `affinity.json`: `tasks, values, subsets, subset_size` and what else is known.

        `values` is T, one way; `symmetric` what is clustered.
        """
        errors = [[None if math.isnan(x) else x for x in row] for row in self.standard_errors.tolist()]
        return {
            "tasks": list(self.tasks),
            "values": self.values.tolist(),
            "symmetric": self.symmetric().tolist(),
            "subsets": len(self.subsets),
            "subset_size": self.subset_size,
            "standard_errors": errors,
            "metric": self.metric,
            "seed": self.seed,
            "members": [[self.tasks[task] for task in subset] for subset in self.subsets],
        }


def subset_size_for(tasks: int, size: int) -> int:
    """The size that can tell partners apart: below the number of tasks where there are three or more."""
    return min(size, tasks - 1 if tasks > 2 else tasks)


def gradient_similarity(features: Sequence[TaskFeatures]) -> Matrix:
    """Cosines between the tasks' mean training margin gradients: (n, n), symmetric; 0 with a task whose mean is zero.

    It costs no fit: the direction in which a task would first move θ, by which partners are looked for among many tasks.
    """
    means = np.stack([task.train_features.mean(axis=0, dtype=np.float64) for task in features])  # (n, d)
    return cosines(means)


def nearest_pairs(similarity: Matrix, neighbours: int) -> NDArray[np.bool_]:
    """The pairs of each task and its `neighbours` most similar others: (n, n) bool, symmetric, diagonal false."""
    n = len(similarity)
    away = np.where(np.eye(n, dtype=bool), -np.inf, similarity)
    nearest = np.argsort(-away, axis=1, kind="stable")[:, : min(neighbours, n - 1)]
    pairs = np.zeros((n, n), dtype=bool)
    np.put_along_axis(pairs, nearest, True, axis=1)
    return pairs | pairs.T


def sample_subsets(tasks: int, count: int, size: int, seed: int, first: NDArray[np.bool_] | None = None) -> list[Group]:
    """Distinct sorted subsets of `range(tasks)`, deterministic in the seed, every pair covered wherever possible.

    `size` is capped at n − 1 (a subset of everything tells no partners apart) and `count` at the number of subsets
    there are. Pairs are covered first, greedily; for n ≤ 50 until all are, even if that takes more than `count` (the
    length of the list tells how many it took), above 50 as far as the count goes, which is then 8 subsets a task at
    least; the pairs in `first` (n, n), symmetric, before all others. The rest is drawn uniformly. Fewer than one task,
    subset or member is a `ValueError`. Size 1 covers no pairs.
    """
    if tasks < 1 or count < 1 or size < 1:
        raise ValueError(f"cannot draw {count} subsets of {size} out of {tasks} tasks")
    size = subset_size_for(tasks, size)
    if tasks > COVER_TASKS:
        count = max(count, math.ceil(SUBSETS_PER_TASK * tasks / size))
    available = math.comb(tasks, size)
    if available <= count:
        return list(combinations(range(tasks), size))
    generator = np.random.default_rng(seed)
    chosen: dict[Group, None] = {}
    if size >= 2:
        away = ~np.eye(tasks, dtype=bool)
        covered = np.eye(tasks, dtype=bool)
        for wanted in [away] if first is None else [first & away, away]:
            uncovered = wanted & ~covered
            degrees = uncovered.sum(axis=1)
            while degrees.any() and (len(chosen) < count or tasks <= COVER_TASKS):
                subset = _covering_subset(uncovered, degrees, size, generator)
                chosen[subset] = None
                where = np.ix_(subset, subset)
                degrees[list(subset)] -= uncovered[where].sum(axis=1)
                uncovered[where], covered[where] = False, True
    while len(chosen) < count:
        chosen[tuple(sorted(int(task) for task in generator.choice(tasks, size, replace=False)))] = None
    return list(chosen)


def job_subsets(features: Sequence[TaskFeatures], settings: EstimatorConfig) -> list[Group]:
    """The subsets of a job: above 50 tasks those first that hold tasks with similar gradients."""
    first = None
    if len(features) > COVER_TASKS:
        first = nearest_pairs(gradient_similarity(features), settings.neighbours)
    return sample_subsets(len(features), settings.subsets, settings.subset_size, settings.seed, first)


def _covering_subset(
    uncovered: NDArray[np.bool_], degrees: NDArray[np.int_], size: int, generator: np.random.Generator
) -> Group:
    """A subset that covers many uncovered pairs: the task with the most of them, then the best partner each time."""
    members = [_argmax(degrees, generator)]
    while len(members) < size:
        gain = uncovered[members].sum(axis=0)
        gain[members] = -1
        members.append(_argmax(gain, generator))
    return tuple(sorted(members))


def _argmax(values: NDArray[np.int_], generator: np.random.Generator) -> int:
    """An index of the largest value, drawn among equals."""
    return int(generator.choice(np.flatnonzero(values == values.max())))


def affinity(
    estimator: Estimator,
    subsets: Sequence[Group],
    metric: Metric = "loss",
    seed: int = 0,
    similarity: Matrix | None = None,
) -> Affinity:
    """Estimate every subset and average: T[i, j] as `Affinity` says, on the search half of the validation data.

    `seed` is only noted: the one that `subsets` were drawn with. `similarity` (n, n), say of gradients, fills in the pairs
    that no subset holds: T[i, j] = mean of row i + slope · (similarity[i, j] − mean similarity of i's sampled pairs), the slope
    fitted to all sampled pairs by least squares, and 0 if that is negative. No subsets are a `ValueError`.
    """
    if not subsets:
        raise ValueError("an affinity needs at least one subset")
    n = len(estimator)
    count, total, squares = np.zeros((n, n), dtype=np.int64), np.zeros((n, n)), np.zeros((n, n))
    for estimate in estimator.groups(subsets):
        members = np.array(estimate.members)
        each = [-found.loss if metric == "loss" else found.accuracy for found in estimate.search]
        where = np.ix_(members, members)
        performance = np.array(each)[:, None]
        count[where] += 1
        total[where] += performance
        squares[where] += performance**2
    own = np.divide(total.diagonal(), count.diagonal(), out=np.zeros(n), where=count.diagonal() > 0)
    values = np.where(count > 0, total / np.maximum(count, 1), own[:, None])
    if similarity is not None:
        values = _filled(values, count, similarity)
    spread = np.maximum(squares - count * values**2, 0.0) / np.maximum(count - 1, 1)
    errors = np.where(count > 1, np.sqrt(spread / np.maximum(count, 1)), np.nan)
    names = tuple(task.name for task in estimator.features)
    return Affinity(names, values, errors, tuple(subsets), max(map(len, subsets)), metric, seed)


def _filled(values: Matrix, count: NDArray[np.int64], similarity: Matrix) -> Matrix:
    """`values` with the pairs that no subset holds predicted from `similarity`, as `affinity` says."""
    known = (count > 0) & ~np.eye(len(values), dtype=bool)
    held = np.maximum(known.sum(axis=1, keepdims=True), 1)
    level = np.where(known, values, 0.0).sum(axis=1, keepdims=True) / held
    nearness = similarity - np.where(known, similarity, 0.0).sum(axis=1, keepdims=True) / held
    across = nearness[known]
    slope = float(across @ (values - level)[known]) / max(float(across @ across), np.finfo(np.float64).tiny)
    # A task that no subset holds with another keeps its own value.
    unknown = (count == 0) & known.any(axis=1, keepdims=True)
    return np.where(unknown, level + max(slope, 0.0) * nearness, values)
