"""Which tasks to train together: partitions, clustering and the search over them.

- `partitions`: partitions, their neighbours and the local search (no Ray)
- `objective`: what a partition is judged by, and the paired comparison of two (no Ray)
- `exact`: the exact optimum for few tasks, the search's yardstick (no Ray)
- `clustering`: first partitions from an affinity, by semidefinite relaxation or spectrally (no Ray)
- `baselines`: random partitions, and groups by a similarity that estimates nothing (no Ray)
- `reassignment`: batches of moves for many tasks (no Ray)
- `cases`: the trials of a search, and one trial as a pure function (no Ray)
- `harm`: tasks that every group is better without (no Ray)
- `fitlog`: fits on disk, for a search that goes on after a stop (no Ray)
- `result`: what a search found (no Ray)
- `search`: Ray Tune over the number of groups, seeds and methods
"""

from typing import TYPE_CHECKING, Any

from ray_ensemble.grouping.cases import group_counts
from ray_ensemble.grouping.result import SearchResult

if TYPE_CHECKING:
    from ray_ensemble.grouping.search import job_estimator, run_search

__all__ = ["SearchResult", "group_counts", "job_estimator", "run_search"]


def __getattr__(name: str) -> Any:
    """Import Ray only for who searches."""
    if name in ("job_estimator", "run_search"):
        from ray_ensemble.grouping import search

        return getattr(search, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
