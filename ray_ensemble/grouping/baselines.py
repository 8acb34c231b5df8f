"""Partitions to hold a found one against: random ones, and groups of tasks that are alike (no Ray)."""

from __future__ import annotations

from typing import Literal

import numpy as np

from ray_ensemble.grouping.clustering import SDP_TASKS, cluster_sdp, cluster_spectral
from ray_ensemble.grouping.partitions import Matrix, Partition, random_partition

Method = Literal["sdp", "spectral"]

_DRAWS = 100  # for each partition wanted, before there seem to be no others


def group_by_similarity(similarity: Matrix, m: int, method: Method, seed: int) -> Partition:
    """m groups of similar tasks by the search's own clustering, and no step of its local search.

    `similarity` (n, n) is symmetric, positive where two tasks belong together; its diagonal does not matter. Above 120 tasks
    `sdp` gives way to `spectral`, as in the search. Errors as for `cluster_sdp`.
    """
    away = np.asarray(similarity, dtype=np.float64).copy()
    if away.ndim == 2 and len(away) == len(away.T):
        np.fill_diagonal(away, 0.0)
    cluster = cluster_sdp if method == "sdp" and len(away) <= SDP_TASKS else cluster_spectral
    return cluster(away, m, seed)


def random_partitions(tasks: int, m: int, count: int, seed: int) -> list[Partition]:
    """`count` distinct partitions of `range(tasks)` into m groups, as `random_partition` draws them, in the order of the draw.

    Fewer where there are not as many. The first ones do not depend on `count`. Errors as for `random_partition`.
    """
    generator = np.random.default_rng(seed)
    found: dict[Partition, None] = {}
    for _ in range(_DRAWS * count):
        if len(found) == count:
            break
        found[random_partition(tasks, m, int(generator.integers(2**32)))] = None
    return list(found)
