"""The trials of a search, and one trial as a pure function of its inputs (no Ray)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_ensemble.config import SearchConfig
from ray_ensemble.errors import InputError
from ray_ensemble.estimator.estimator import Estimator
from ray_ensemble.grouping.clustering import SDP_TASKS, cluster_sdp, cluster_sdp_penalty, cluster_spectral
from ray_ensemble.grouping.objective import objective
from ray_ensemble.grouping.partitions import Partition, canonical, improve, perturb
from ray_ensemble.grouping.reassignment import Reassigned, reassign

RESTARTS = 4  # of k-means in a trial: fewer than when clustering alone, since other seeds are other trials
FREE_METHODS = ("sdp-penalty",)  # these choose the number of groups themselves
REASSIGN_TASKS = 50  # up to this many tasks the local search tries most neighbours
EVALUATIONS = 2000
EVALUATED_TASKS = 120_000  # evaluations times tasks at most: a fit takes as long as its group is large
KICK = 5  # a trial that repeats (m, method) first makes one random change for every so many tasks


def group_counts(search: SearchConfig, tasks: int) -> list[int]:
    """The numbers of groups to try, sorted and distinct.

    One above the number of tasks is an `InputError`; but of the default numbers, those that fit are taken.
    """
    fitting = sorted({m for m in search.groups if m <= tasks})
    if search.groups != SearchConfig().groups and len(fitting) < len(set(search.groups)):
        raise InputError(
            f"search.groups: more groups than tasks: {max(search.groups)} groups of {tasks} tasks; "
            f"ask for {tasks} at most"
        )
    return fitting or [tasks]


def search_cases(search: SearchConfig, tasks: int) -> list[dict[str, Any]]:
    """The distinct trials `{"m", "method", "seed", "repeat"}`: every m with the first method, then the next, then again.

    A method that chooses the number of groups itself (`sdp-penalty`) has one trial a round, with m None. With m = 1 or m = n
    there is one partition, hence one trial; so there can be fewer than `search.trials`. Relaxations alone for more than
    120 tasks are an `InputError`; beside another method they are left out.
    """
    wanted = list(dict.fromkeys(search.methods))
    methods = [method for method in wanted if method == "spectral" or tasks <= SDP_TASKS]
    if not methods:
        raise InputError(
            f"search.methods: {', '.join(wanted)} is for {SDP_TASKS} tasks at most, these are {tasks}; add spectral"
        )
    counts = group_counts(search, tasks)
    told = [method for method in methods if method not in FREE_METHODS]
    several = [m for m in counts if m not in (1, tasks)]  # that have more than one partition
    if told and not several:
        methods = told
    cases: list[dict[str, Any]] = []
    for repeat in range(search.trials if several else 1):
        for method in methods:
            tried = counts if repeat == 0 and [method] == told[:1] else several
            ms: list[int | None] = [None] if method in FREE_METHODS else [*tried]
            cases += [{"m": m, "method": method, "seed": search.seed + repeat, "repeat": repeat} for m in ms]
        if len(cases) >= search.trials:
            break
    return cases[: search.trials]


def run_case(
    case: dict[str, Any], estimator: Estimator, similarity: NDArray[np.float64], search: SearchConfig
) -> dict[str, Any]:
    """Cluster and improve: one trial as a pure function of its inputs.

    Returns the m that was found, method, seed, λ_ref, the partition as text (`"0,2|1"`), `objective` and `start_objective`
    (before the local search), price included, mean `accuracy`, all on the search half, and the operations of the fits that no
    cache keeps. Where the case leaves m open, the local search may change it among the numbers that `search.groups` allows.
    Above 50 tasks batches of reassigned tasks come before the local search, which then tries fewer partitions the more
    tasks there are, so that its time and memory do not grow with them.
    """

    def value(partition: Partition) -> float:
        return objective(estimator, partition, search.objective, search.price)

    m, method, seed = case["m"], case["method"], case["seed"]
    counts = group_counts(search, len(estimator)) if m is None else None
    if counts is not None:
        start = cluster_sdp_penalty(similarity, counts, seed, value, RESTARTS)
    else:
        cluster = cluster_sdp if method == "sdp" else cluster_spectral
        start = cluster(similarity, m, seed, RESTARTS)
    if case["repeat"]:
        # Other k-means seeds mostly give the same groups; a kick makes the local search start somewhere else.
        start = perturb(start, 1 + len(estimator) // KICK, seed)
    begun = Reassigned(start, 0)
    if len(estimator) > REASSIGN_TASKS:
        begun = reassign(start, estimator, value, search.objective, similarity)
    evaluations = min(EVALUATIONS, EVALUATED_TASKS // len(estimator))
    found = improve(begun.partition, value, seed=seed, guide=similarity, counts=counts, evaluations=evaluations)
    accuracy = np.mean([estimate.accuracy for estimate in estimator.tasks(found.partition, "search")])
    return {
        "m": len(found.partition),
        "method": method,
        "seed": seed,
        "regularization": estimator.regularization,
        "objective": found.objective,
        "accuracy": float(accuracy),
        "start_objective": value(start),
        "reassignment_flops": begun.flops,
        "partition": format_partition(found.partition),
    }


def format_partition(partition: Partition) -> str:
    """A partition as text in one table cell: `"0,2|1"`."""
    return "|".join(",".join(map(str, group)) for group in partition)


def parse_partition(text: str) -> Partition:
    """The partition that `format_partition` wrote."""
    return canonical([[int(task) for task in group.split(",")] for group in text.split("|")])
