"""Partitions of tasks into groups, and a local search that improves them on the objective (DESIGN section 2.5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Group = tuple[int, ...]
Partition = tuple[Group, ...]
Objective = Callable[[Partition], float]

MARGIN = 1e-9  # an improvement below this is rounding: taking it would let two machines part ways, or walk in circles
FRUITLESS_SWEEPS = 3  # over a sample of the neighbours, before a local search gives up
KICK_CHANGES = 2  # of a kick: one is undone by the first sweep, many forget what was found


@dataclass(frozen=True)
class Change:
    """A neighbour of a partition: task `first` moves to the group of task `second`, or both change places (`swap`)."""

    first: int
    second: int
    swap: bool


@dataclass(frozen=True)
class Improved:
    """The end of a local search: its partition and objective, neighbours evaluated, and whether it is a local optimum.

    `optimal` is true only where a whole sweep over all neighbours found nothing better.
    """

    partition: Partition
    objective: float
    evaluations: int
    optimal: bool


def canonical(groups: Iterable[Iterable[int]]) -> Partition:
    """Sorted tuple of sorted tuples, so groups are in the order of their first tasks.

    An empty group, or a task in two groups, is a `ValueError`.
    """
    partition = tuple(sorted(tuple(sorted(int(task) for task in group)) for group in groups))
    tasks = [task for group in partition for task in group]
    if not all(partition) or len(tasks) != len(set(tasks)):
        raise ValueError(f"not a partition: {partition}")
    return partition


def from_labels(labels: Sequence[int] | NDArray[Any]) -> Partition:
    """The partition whose groups are the tasks of equal label."""
    groups: dict[int, list[int]] = {}
    for task, label in enumerate(labels):
        groups.setdefault(int(label), []).append(task)
    return canonical(groups.values())


def to_labels(partition: Partition) -> list[int]:
    """For each task the index of its group. Tasks that are not 0..n−1 are a `ValueError`."""
    found = {task: index for index, group in enumerate(partition) for task in group}
    if sorted(found) != list(range(len(found))):
        raise ValueError(f"the tasks of {partition} are not 0..{len(found) - 1}")
    return [found[task] for task in range(len(found))]


def random_partition(tasks: int, groups: int, seed: int) -> Partition:
    """A partition of `range(tasks)` into exactly `groups` groups: a random task each, the rest drawn evenly.

    More groups than tasks, or none, is a `ValueError`.
    """
    if not 1 <= groups <= tasks:
        raise ValueError(f"cannot partition {tasks} tasks into {groups} groups")
    generator = np.random.default_rng(seed)
    labels = generator.integers(groups, size=tasks)
    labels[generator.permutation(tasks)[:groups]] = np.arange(groups)
    return from_labels(labels)


def changes(partition: Partition) -> list[Change]:
    """All moves and swaps that keep the number of groups, in a fixed order.

    A move is written with one task of the target group (its smallest), so that a list of changes stays meaningful
    while groups change. A task alone is never moved; swaps between two tasks that are both alone change nothing and
    are left out.
    """
    found = []
    for source, group in enumerate(partition):
        for target, other in enumerate(partition):
            if source == target:
                continue
            if len(group) > 1:
                found += [Change(task, other[0], swap=False) for task in group]
            if source < target and (len(group) > 1 or len(other) > 1):
                found += [Change(task, with_, swap=True) for task in group for with_ in other]
    return found


def apply(partition: Partition, change: Change) -> Partition:
    """The partition after the change; the same one where it no longer applies (same group, or a group left empty)."""
    groups = [set(group) for group in partition]
    source = next(group for group in groups if change.first in group)
    target = next(group for group in groups if change.second in group)
    if source is target or (not change.swap and len(source) == 1):
        return partition
    source.remove(change.first)
    target.add(change.first)
    if change.swap:
        target.remove(change.second)
        source.add(change.second)
    return canonical(groups)


def perturb(partition: Partition, count: int, seed: int) -> Partition:
    """The partition after `count` random moves or swaps: another start for the local search, of as many groups."""
    generator = np.random.default_rng(seed)
    for _ in range(count):
        options = changes(partition)
        if not options:
            break
        partition = apply(partition, options[int(generator.integers(len(options)))])
    return partition


def guided_gain(partition: Partition, change: Change, guide: NDArray[np.float64]) -> float:
    """Change of the summed in-group density Σ_g Σ_{i,j∈g} A[i,j]/|g| under a symmetric affinity A (n, n)."""

    def density(group: Group) -> float:
        return float(guide[np.ix_(group, group)].sum()) / len(group)

    after = apply(partition, change)
    before = set(partition)
    return sum(density(g) for g in after if g not in before) - sum(density(g) for g in before.difference(after))


def improve(
    partition: Partition,
    objective: Objective,
    *,
    seed: int = 0,
    kicks: int = 5,
    neighbours: int = 160,
    evaluations: int = 2000,
    guide: NDArray[np.float64] | None = None,
) -> Improved:
    """Local search by moves and swaps that keeps the number of groups and never worsens the objective.

    A sweep visits the neighbours in an order drawn with `seed` and takes every one that is better by more than 1e-9 as it
    comes (first improvement), until a sweep finds none. From the local optimum the search starts again `kicks` times after
    two random changes and keeps what is better (iterated local search), all within `evaluations` neighbours. Where there
    are more than `neighbours` of them a sweep only tries that many: half the most promising by `guide`, a symmetric
    affinity (n, n), and half drawn at random, moves before swaps (all drawn where there is no guide); several such
    sweeps must find nothing before it ends. Deterministic in its arguments.
    """
    generator = np.random.default_rng(seed)
    best = _descend(
        Improved(partition, objective(partition), 0, optimal=False),
        objective,
        neighbours,
        evaluations,
        guide,
        generator,
    )
    for _ in range(kicks):
        if best.evaluations >= evaluations:
            break
        start = perturb(best.partition, KICK_CHANGES, int(generator.integers(2**32)))
        begun = Improved(start, objective(start), best.evaluations + 1, optimal=False)
        found = _descend(begun, objective, neighbours, evaluations, guide, generator)
        better = found if found.objective < best.objective - MARGIN else best
        best = replace(better, evaluations=found.evaluations)
    return best


def _descend(
    start: Improved,
    objective: Objective,
    neighbours: int,
    evaluations: int,
    guide: NDArray[np.float64] | None,
    generator: np.random.Generator,
) -> Improved:
    """Sweep from `start` until nothing better is found or the count of evaluations is reached.

    One sweep over all neighbours tells; of sweeps over some, several in a row must find nothing.
    """
    partition, best, spent = start.partition, start.objective, start.evaluations
    fruitless = 0
    while True:
        options = changes(partition)
        improved = False
        for change in _visit(partition, options, neighbours, guide, generator):
            candidate = apply(partition, change)
            if candidate == partition:
                continue
            if spent >= evaluations:
                return Improved(partition, best, spent, optimal=False)
            value = objective(candidate)
            spent += 1
            if value < best - MARGIN:
                partition, best, improved = candidate, value, True
        whole = len(options) <= neighbours
        fruitless = 0 if improved else fruitless + 1
        if fruitless >= (1 if whole else FRUITLESS_SWEEPS):
            return Improved(partition, best, spent, optimal=whole)


def _visit(
    partition: Partition,
    options: list[Change],
    neighbours: int,
    guide: NDArray[np.float64] | None,
    generator: np.random.Generator,
) -> list[Change]:
    """The changes to try in one sweep, in order."""
    order = [options[int(index)] for index in generator.permutation(len(options))]
    if len(order) <= neighbours:
        return order
    if guide is None:
        return order[:neighbours]
    # Scoring is cheap but not free, and swaps grow with n²: many more than are tried need not be scored.
    pool = order[: 20 * neighbours]
    gains = np.array([guided_gain(partition, change, guide) for change in pool])
    promising = [pool[int(index)] for index in np.argsort(-gains, kind="stable")[: neighbours // 2]]
    taken = set(promising)
    # A swap is two moves that only help together: far from an optimum a random move is the better bet.
    rest = sorted((change for change in order if change not in taken), key=lambda change: change.swap)
    return promising + rest[: neighbours - len(promising)]
