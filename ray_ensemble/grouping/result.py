"""What a search found, and how the best of its trials is picked (no Ray)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_ensemble.estimator.affinity import Affinity
from ray_ensemble.estimator.estimator import Estimator, Metric
from ray_ensemble.estimator.predict import Estimate
from ray_ensemble.grouping.cases import parse_partition
from ray_ensemble.grouping.fitlog import FitLog
from ray_ensemble.grouping.partitions import Partition


@dataclass(frozen=True)
class SearchResult:
    """What the search found.

    - `groups` are task names and `partition` their indices, in the order of the groups' first tasks;
    - `objective` is on the report half of the validation data, `search_objective` on the half that was searched on,
      as is all that is called so below; both are mean loss in nats, or for `metric` accuracy as `Estimator.objective`
      says;
    - `estimates` has each task's estimate under its group, on the report half;
    - `references` has the objectives of one group of everything (`together`) and of a group each (`alone`), on both halves;
    - `by_m` has a row for each number of groups, to plot: `m`, `trials`, best `search_objective`, `mean` and `worst`
      over trials, and `objective` of the best;
    - `fits` counts the distinct groups estimated and `flops` the operations of them and of the choice of λ, whether
      they were done in this call or before a stop; `seconds` are of this call,
      and `peak_memory_bytes` is the largest resident set of any one process, this one or a trial's.
    """

    groups: tuple[tuple[str, ...], ...]
    partition: Partition
    m: int
    objective: float
    search_objective: float
    metric: Metric
    method: str
    seed: int
    regularization: float
    estimates: dict[str, Estimate]
    references: dict[str, dict[str, float]]
    by_m: tuple[dict[str, Any], ...]
    affinity: Affinity
    trials: int
    fits: int
    flops: int
    seconds: float = 0.0
    peak_memory_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """The content of `partition.json`; without times, so that equal inputs give equal bytes."""
        return {
            "groups": [list(group) for group in self.groups],
            "m": self.m,
            "objective": self.objective,
            "method": self.method,
            "seed": self.seed,
            "search_objective": self.search_objective,
            "metric": self.metric,
            "regularization": self.regularization,
            "estimates": {
                name: {"loss": found.loss, "accuracy": found.accuracy} for name, found in self.estimates.items()
            },
            "references": self.references,
            "by_m": list(self.by_m),
            "trials": self.trials,
            "fits": self.fits,
            "flops": self.flops,
        }


def best_result(
    table: Sequence[dict[str, Any]], estimator: Estimator, similarity: Affinity, fits: FitLog
) -> SearchResult:
    """Pick the best trial of `table`, whose rows are what `cases.run_case` returns; at least one.

    The lowest objective rounded to 1e-9 wins; of equals the one with fewer groups, then the first in order of its partition.
    """
    metric = similarity.metric
    winner = min(table, key=_rank)
    partition = parse_partition(winner["partition"])
    names = [task.name for task in estimator.features]
    references: dict[str, list[Sequence[int]]] = {
        "together": [range(len(names))],
        "alone": [[task] for task in range(len(names))],
    }
    spent = fits.reference.flops if fits.reference else 0
    return SearchResult(
        groups=tuple(tuple(names[task] for task in group) for group in partition),
        partition=partition,
        m=len(partition),
        objective=estimator.objective(partition, metric, "report"),
        search_objective=float(winner["objective"]),
        metric=metric,
        method=str(winner["method"]),
        seed=int(winner["seed"]),
        regularization=estimator.regularization,
        estimates=dict(zip(names, estimator.tasks(partition, "report"), strict=True)),
        references={
            name: {
                "objective": estimator.objective(reference, metric, "report"),
                "search_objective": estimator.objective(reference, metric, "search"),
            }
            for name, reference in references.items()
        },
        by_m=tuple(
            _row_of([row for row in table if row["m"] == m], estimator, metric)
            for m in sorted({row["m"] for row in table})
        ),
        affinity=similarity,
        trials=len(table),
        fits=len(fits.known),
        flops=spent + sum(estimate.flops for estimate in fits.known.values()),
    )


def _rank(row: dict[str, Any]) -> tuple[float, int, Partition]:
    return round(row["objective"], 9), row["m"], parse_partition(row["partition"])


def _row_of(rows: Sequence[dict[str, Any]], estimator: Estimator, metric: Metric) -> dict[str, Any]:
    best = min(rows, key=_rank)
    objectives = [float(row["objective"]) for row in rows]
    return {
        "m": int(best["m"]),
        "trials": len(rows),
        "search_objective": min(objectives),
        "mean": float(np.mean(objectives)),
        "worst": max(objectives),
        "objective": estimator.objective(parse_partition(best["partition"]), metric, "report"),
    }
