"""The trials of a search, and one trial as a pure function of its inputs (no Ray)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_ensemble.config import SearchConfig
from ray_ensemble.errors import InputError
from ray_ensemble.estimator.estimator import Estimator, Metric
from ray_ensemble.grouping.clustering import SDP_TASKS, cluster_sdp, cluster_spectral
from ray_ensemble.grouping.partitions import Partition, canonical, improve, perturb

RESTARTS = 4  # of k-means in a trial: fewer than when clustering alone, since other seeds are other trials
KICK = 5  # a trial that repeats (m, method) first makes one random change for every so many tasks


def group_counts(search: SearchConfig, tasks: int) -> list[int]:
    """The numbers of groups to try, sorted and distinct.

    One above the number of tasks is an `InputError` if the job file asked for it; of the defaults, those that fit are taken.
    """
    fitting = sorted({m for m in search.groups if m <= tasks})
    if "groups" in search.model_fields_set and len(fitting) < len(set(search.groups)):
        raise InputError(
            f"search.groups: more groups than tasks: {max(search.groups)} groups of {tasks} tasks; "
            f"ask for {tasks} at most"
        )
    return fitting or [tasks]


def search_cases(search: SearchConfig, tasks: int) -> list[dict[str, Any]]:
    """The distinct trials `{"m", "method", "seed", "repeat"}`: every m with the first method, then the next, then again.

    With m = 1 or m = n there is one partition, hence one trial; so there can be fewer than `search.trials`. The
    relaxation alone for more than 120 tasks is an `InputError`; beside another method it is left out.
    """
    methods = [method for method in dict.fromkeys(search.methods) if method != "sdp" or tasks <= SDP_TASKS]
    if not methods:
        raise InputError(f"search.methods: sdp is for {SDP_TASKS} tasks at most, these are {tasks}; add spectral")
    counts = group_counts(search, tasks)
    cases: list[dict[str, Any]] = []
    for repeat in range(search.trials):
        for method in methods:
            for m in counts:
                if m in (1, tasks) and (repeat or method != methods[0]):
                    continue
                cases.append({"m": m, "method": method, "seed": search.seed + repeat, "repeat": repeat})
        if len(cases) >= search.trials:
            break
    return cases[: search.trials]


def run_case(
    case: dict[str, Any], estimator: Estimator, similarity: NDArray[np.float64], metric: Metric
) -> dict[str, Any]:
    """Cluster and improve: one trial as a pure function of its inputs.

    Returns m, method, seed, the partition as text (`"0,2|1"`), `objective` and `start_objective` (before the local
    search), and mean `accuracy`, all on the search half.
    """
    m, method, seed = case["m"], case["method"], case["seed"]
    cluster = cluster_sdp if method == "sdp" else cluster_spectral
    start = cluster(similarity, m, seed, RESTARTS)
    if case["repeat"]:
        # Other k-means seeds mostly give the same groups; a kick makes the local search start somewhere else.
        start = perturb(start, 1 + len(estimator) // KICK, seed)

    def objective(partition: Partition) -> float:
        return estimator.objective(partition, metric)

    found = improve(start, objective, seed=seed, guide=similarity)
    accuracy = np.mean([estimate.accuracy for estimate in estimator.tasks(found.partition, "search")])
    return {
        "m": m,
        "method": method,
        "seed": seed,
        "objective": found.objective,
        "accuracy": float(accuracy),
        "start_objective": objective(start),
        "partition": format_partition(found.partition),
    }


def format_partition(partition: Partition) -> str:
    """A partition as text in one table cell: `"0,2|1"`."""
    return "|".join(",".join(map(str, group)) for group in partition)


def parse_partition(text: str) -> Partition:
    """The partition that `format_partition` wrote."""
    return canonical([[int(task) for task in group.split(",")] for group in text.split("|")])
