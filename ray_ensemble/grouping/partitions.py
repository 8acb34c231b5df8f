"""Partitions of tasks into groups, and a local search that improves them on the objective (DESIGN section 2.5)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Group = tuple[int, ...]
Partition = tuple[Group, ...]
Matrix = NDArray[np.float64]
Objective = Callable[[Partition], float]

MARGIN = 1e-9  # an improvement below this is rounding: taking it would let two machines part ways, or walk in circles
FRUITLESS_SWEEPS = 3  # over a sample of the neighbours, before a local search gives up
SCORED_SWAPS = 20  # for each neighbour that a sweep tries: scoring swaps is cheap but not free
KICK_CHANGES = 2  # of a kick: one is undone by the first sweep, many forget what was found


class Change(NamedTuple):
    """A neighbour of a partition.

    - `move`: task `first` goes to the group of task `second`; `swap`: both change places;
    - `merge`: the groups of `first` and `second` become one;
    - `split`: `part` leaves the group of `first` for a group of its own (`second` is `first`).
    """

    kind: Literal["move", "swap", "merge", "split"]
    first: int
    second: int
    part: Group = ()


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


def changes(partition: Partition, counts: Collection[int] | None = None, guide: Matrix | None = None) -> list[Change]:
    """The neighbours of a partition in a fixed order: all moves and swaps, which keep the number of groups m.

    Where `counts` holds m − 1, also all merges of two groups; where it holds m + 1, splits: each task alone, and with
    `guide`, a symmetric affinity (n, n), halves of a group of s tasks, each task going with the nearer of two that are far
    apart, for the s pairs that are furthest apart.

    A move is written with one task of the target group (its smallest), so that a list of changes stays meaningful
    while groups change. A task alone is never moved (that is a merge); swaps between two tasks that are both alone change
    nothing and are left out.
    """
    found: list[Change] = []
    for source, group in enumerate(partition):
        for target, other in enumerate(partition):
            if source == target:
                continue
            if len(group) > 1:
                found += [Change("move", task, other[0]) for task in group]
            if source < target and (len(group) > 1 or len(other) > 1):
                found += [Change("swap", task, with_) for task in group for with_ in other]
    if counts is None:
        return found
    if len(partition) - 1 in counts:
        found += [
            Change("merge", group[0], other[0]) for g, group in enumerate(partition) for other in partition[g + 1 :]
        ]
    if len(partition) + 1 in counts:
        found += [Change("split", group[0], group[0], part) for group in partition for part in _parts(group, guide)]
    return found


def _parts(group: Group, guide: Matrix | None) -> list[Group]:
    """The parts to split off a group: a task each, and halves around two tasks that are far apart; none twice."""
    size = len(group)
    if size < 2:
        return []
    if size == 2:
        return [group[1:]]
    parts: dict[Group, None] = {(task,): None for task in group}
    if guide is not None and size > 3:
        inside = guide[np.ix_(group, group)]
        first, second = np.triu_indices(size, 1)
        for pair in np.argsort(inside[first, second], kind="stable")[:size]:
            with_second = inside[:, second[pair]] > inside[:, first[pair]]
            with_second[[first[pair], second[pair]]] = False, True
            if with_second[0]:  # the same halves written in one way: the part is the half without the first task
                with_second = ~with_second
            parts[tuple(task for task, taken in zip(group, with_second, strict=True) if taken)] = None
        # All but one of the tasks split off is that one alone.
        parts.pop(group[1:], None)
    return list(parts)


def apply(partition: Partition, change: Change) -> Partition:
    """The partition after the change; the same one where it no longer applies (same group, or a group left empty)."""
    source = next(group for group in partition if change.first in group)
    target = next(group for group in partition if change.second in group)
    if change.kind == "split":
        leaving = set(change.part)
        part = tuple(task for task in source if task in leaving)
        after = [tuple(task for task in source if task not in leaving), part]
    elif change.kind == "merge":
        after = [(*source, *target)]
    else:
        after = [tuple(task for task in source if task != change.first), (*target, change.first)]
        if change.kind == "swap":
            after = [(*after[0], change.second), tuple(task for task in after[1] if task != change.second)]
    if (source is target) != (change.kind == "split") or not all(after):
        return partition
    rest = [group for group in partition if group is not source and group is not target]
    return tuple(sorted([*rest, *(tuple(sorted(group)) for group in after)]))


def perturb(partition: Partition, count: int, seed: int) -> Partition:
    """The partition after `count` random moves or swaps: another start for the local search, of as many groups.

    Each of them is equally likely, as if drawn from `changes`, of which there are too many to list for hundreds of tasks.
    """
    generator = np.random.default_rng(seed)
    for _ in range(count):
        sizes = np.array([len(group) for group in partition])
        alone = int((sizes == 1).sum())
        moves = int(sizes[sizes > 1].sum()) * (len(sizes) - 1)
        swaps = int(sizes.sum() ** 2 - (sizes**2).sum() - alone * (alone - 1)) // 2
        if moves + swaps == 0:
            break
        kind: Literal["move", "swap"] = "move" if generator.integers(moves + swaps) < moves else "swap"
        changed = partition
        while changed == partition:  # drawn again where both are in one group, or alone
            group = partition[int(generator.integers(len(sizes)))]
            second = group[0] if kind == "move" else _any_task(partition, generator)
            changed = apply(partition, Change(kind, _any_task(partition, generator), second))
        partition = changed
    return partition


def _any_task(partition: Partition, generator: np.random.Generator) -> int:
    tasks = [task for group in partition for task in group]
    return tasks[int(generator.integers(len(tasks)))]


def resize(partition: Partition, groups: int, seed: int) -> Partition:
    """A partition of exactly `groups` groups, by random merges or random splits of the one given.

    More groups than tasks, or none, is a `ValueError`.
    """
    tasks = sum(map(len, partition))
    if not 1 <= groups <= tasks:
        raise ValueError(f"cannot partition {tasks} tasks into {groups} groups")
    generator = np.random.default_rng(seed)
    while len(partition) > groups:
        first, second = generator.choice(len(partition), 2, replace=False)
        partition = apply(partition, Change("merge", partition[first][0], partition[second][0]))
    while len(partition) < groups:
        large = [group for group in partition if len(group) > 1]
        group = large[int(generator.integers(len(large)))]
        chosen = generator.permutation(group)[: int(generator.integers(1, len(group)))]
        partition = apply(partition, Change("split", group[0], group[0], tuple(int(task) for task in chosen)))
    return partition


def guided_gains(partition: Partition, options: Sequence[Change], guide: Matrix) -> NDArray[np.float64]:
    """For each change, which must apply, that of the summed in-group density Σ_g Σ_{i,j∈g} A[i,j]/|g|.

    A is `guide`, a symmetric affinity (n, n). A task alone thus adds A[i,i]. Returns (len(options),) float64.
    """
    labels = to_labels(partition)
    sizes = [len(group) for group in partition]
    to_group = guide @ np.equal.outer(labels, range(len(partition)))  # (n, m): Σ_{j∈g} A[i,j]
    sums = [float(to_group[list(group), index].sum()) for index, group in enumerate(partition)]
    own = guide.diagonal()
    gains = np.empty(len(options))
    for place, (kind, first, second, part) in enumerate(options):
        a, b = labels[first], labels[second]
        before = sums[a] / sizes[a] + (0.0 if kind == "split" else sums[b] / sizes[b])
        left, joined = sums[a] - 2 * to_group[first, a] + own[first], sums[b] + 2 * to_group[first, b] + own[first]
        if kind == "move":
            after = left / (sizes[a] - 1) + joined / (sizes[b] + 1)
        elif kind == "swap":
            left += 2 * (to_group[second, a] - guide[first, second]) + own[second]
            joined -= 2 * (to_group[second, b] + guide[first, second]) - own[second]
            after = left / sizes[a] + joined / sizes[b]
        elif kind == "merge":
            across = float(to_group[list(partition[b]), a].sum())
            after = (sums[a] + sums[b] + 2 * across) / (sizes[a] + sizes[b])
        else:
            inner = float(guide[np.ix_(part, part)].sum())
            rest = sums[a] - 2 * float(to_group[list(part), a].sum()) + inner
            after = inner / len(part) + rest / (sizes[a] - len(part))
        gains[place] = after - before
    return gains


def improve(
    partition: Partition,
    objective: Objective,
    *,
    seed: int = 0,
    kicks: int = 5,
    neighbours: int = 160,
    evaluations: int = 2000,
    guide: Matrix | None = None,
    counts: Collection[int] | None = None,
) -> Improved:
    """Local search by moves and swaps that never worsens the objective, and keeps the number of groups m.

    With `counts`, the numbers of groups that are allowed, m is free: merges and splits are tried, too. A partition whose m
    is not among them is a `ValueError`.

    A sweep visits the neighbours in an order drawn with `seed` and takes every one that is better by more than 1e-9 as it
    comes (first improvement), until a sweep finds none. From the local optimum the search starts again `kicks` times after
    two random changes, where m is free from each allowed number of groups in turn, and keeps what is better (iterated local
    search), all within `evaluations` neighbours. Where there are more than `neighbours` of them a sweep only tries
    that many: half the most promising by `guide`, a symmetric affinity (n, n), and half drawn at random, swaps last (all
    drawn where there is no guide); several such sweeps must find nothing before it ends. Deterministic in its arguments.
    """
    if counts is not None and len(partition) not in counts:
        raise ValueError(f"a partition into {len(partition)} groups, where {sorted(counts)} are allowed")
    generator = np.random.default_rng(seed)
    sweeps = _Sweeps(neighbours, guide, counts, generator)
    best = _descend(Improved(partition, objective(partition), 0, optimal=False), objective, evaluations, sweeps)
    # Where m is free every number of groups is begun from: between two of them there may be worse partitions only.
    others = [] if counts is None else [int(m) for m in generator.permutation(sorted(counts))]
    for kick in range(max(kicks, len(others))):
        if best.evaluations >= evaluations:
            break
        start = best.partition
        if others:
            start = resize(start, others[kick % len(others)], int(generator.integers(2**32)))
        start = perturb(start, KICK_CHANGES, int(generator.integers(2**32)))
        begun = Improved(start, objective(start), best.evaluations + 1, optimal=False)
        found = _descend(begun, objective, evaluations, sweeps)
        better = found if found.objective < best.objective - MARGIN else best
        best = replace(better, evaluations=found.evaluations)
    return best


@dataclass(frozen=True)
class _Sweeps:
    """How the neighbours of a partition are visited; arguments as for `improve`."""

    neighbours: int
    guide: Matrix | None
    counts: Collection[int] | None
    generator: np.random.Generator

    def visit(self, partition: Partition) -> tuple[list[Change], bool]:
        """The changes to try in one sweep, in order, and whether these are all there are."""
        options = changes(partition, self.counts, self.guide)
        order = [options[int(index)] for index in self.generator.permutation(len(options))]
        if len(order) <= self.neighbours:
            return order, True
        if self.guide is None:
            return order[: self.neighbours], False
        # Swaps grow with n², and one is two moves that only help together: far from an optimum others are the better bet.
        others, swaps = ([c for c in order if (c.kind == "swap") is swap] for swap in (False, True))
        pool = others + swaps[: SCORED_SWAPS * self.neighbours]
        gains = guided_gains(partition, pool, self.guide)
        promising = [pool[int(index)] for index in np.argsort(-gains, kind="stable")[: self.neighbours // 2]]
        taken = set(promising)
        rest = (change for change in (*others, *swaps) if change not in taken)
        return promising + list(islice(rest, self.neighbours - len(promising))), False


def _descend(start: Improved, objective: Objective, evaluations: int, sweeps: _Sweeps) -> Improved:
    """Sweep from `start` until nothing better is found or the count of evaluations is reached.

    One sweep over all neighbours tells; of sweeps over some, several in a row must find nothing.
    """
    partition, best, spent = start.partition, start.objective, start.evaluations
    fruitless = 0
    while True:
        options, whole = sweeps.visit(partition)
        improved = False
        for change in options:
            candidate = apply(partition, change)
            # A change drawn for an earlier partition of this sweep may no longer apply, or lead out of the allowed counts.
            if candidate == partition or (sweeps.counts is not None and len(candidate) not in sweeps.counts):
                continue
            if spent >= evaluations:
                return Improved(partition, best, spent, optimal=False)
            value = objective(candidate)
            spent += 1
            if value < best - MARGIN:
                partition, best, improved = candidate, value, True
        fruitless = 0 if improved else fruitless + 1
        if fruitless >= (1 if whole else FRUITLESS_SWEEPS):
            return Improved(partition, best, spent, optimal=whole)
