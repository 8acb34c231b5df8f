"""The exact optimum of the objective for few tasks: the yardstick that the search is measured with.

The objective is a sum over groups, so that an optimal partition of a set is one group, the one that holds its first task, and
an optimal partition of the rest. Dynamic programming over subsets needs 2ⁿ − 1 group values and 3ⁿ/2 joins for all numbers
of groups at once (Bellman 1962 for the principle; Rothkopf, Pekeč and Harstad 1998 for partitions).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ray_ensemble.errors import InputError
from ray_ensemble.estimator.estimator import Estimator, Group, Metric
from ray_ensemble.grouping.objective import group_value
from ray_ensemble.grouping.partitions import Partition, canonical

EXACT_TASKS = 12  # 4,095 fits; each task more doubles them


@dataclass(frozen=True)
class Optimum:
    """A partition with the lowest objective of its number of groups, price included."""

    partition: Partition
    objective: float


def exact_optima(tasks: int, value: Callable[[Group], float], price: float = 0.0) -> dict[int, Optimum]:
    """The optimum for each number of groups m from 1 to `tasks`.

    `value` maps a group (sorted task indices) to the sum of its members' values, and is asked once for each of the 2ⁿ − 1
    groups. The objective of a partition is Σ value / n + `price` · m. More than 12 tasks are an `InputError`, none a
    `ValueError`.
    """
    if tasks > EXACT_TASKS:
        raise InputError(f"the exact optimum is for {EXACT_TASKS} tasks at most, these are {tasks}; use the search")
    if tasks < 1:
        raise ValueError("the exact optimum of no tasks")
    size = 1 << tasks
    values = np.array([np.inf, *(value(_members(group)) for group in range(1, size))])
    # best[S, m] is the least sum over partitions of S into m groups, chosen[S, m] its group that holds the first task of S.
    best = np.full((size, tasks + 1), np.inf)
    best[0, 0] = 0.0
    chosen = np.zeros((size, tasks + 1), dtype=np.int64)
    for whole in range(1, size):
        first = whole & -whole
        groups = _subsets(whole ^ first) | first
        joined = values[groups, None] + best[whole ^ groups, :-1]  # (2^(|S| − 1), n)
        winners = joined.argmin(axis=0)
        best[whole, 1:] = joined[winners, np.arange(tasks)]
        chosen[whole, 1:] = groups[winners]
    return {
        m: Optimum(_traced(chosen, size - 1, m), float(best[-1, m]) / tasks + price * m) for m in range(1, tasks + 1)
    }


def estimated_optima(estimator: Estimator, metric: Metric = "loss", price: float = 0.0) -> dict[int, Optimum]:
    """`exact_optima` of the estimated objective on the search half; fits every group there is."""
    if len(estimator) <= EXACT_TASKS:
        estimator.groups(
            _members(group) for group in range(1, 1 << len(estimator))
        )  # all at once where there is a device
    return exact_optima(len(estimator), group_value(estimator, metric), price)


def best_optimum(optima: Mapping[int, Optimum], groups: Collection[int] | None = None) -> Optimum:
    """The best over all m, or over those in `groups`; of equals the one with fewer groups. None there is a `ValueError`."""
    allowed = sorted(m for m in optima if groups is None or m in groups)
    if not allowed:
        raise ValueError(f"no optimum for any of {groups} groups; there are those for {sorted(optima)}")
    return min((optima[m] for m in allowed), key=lambda optimum: optimum.objective)


def _members(group: int) -> Group:
    return tuple(task for task in range(group.bit_length()) if group >> task & 1)


def _subsets(mask: int) -> NDArray[np.int64]:
    """All subsets of a bit mask, the empty one first."""
    found = np.zeros(1, dtype=np.int64)
    for task in _members(mask):
        found = np.concatenate([found, found | 1 << task])
    return found


def _traced(chosen: NDArray[np.int64], whole: int, m: int) -> Partition:
    groups = []
    for left in range(m, 0, -1):
        group = int(chosen[whole, left])
        groups.append(_members(group))
        whole ^= group
    return canonical(groups)
