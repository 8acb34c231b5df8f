"""What a search found, and how the best of its trials is picked (no Ray)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ray_ensemble.config import SearchConfig
from ray_ensemble.estimator.affinity import Affinity
from ray_ensemble.estimator.estimator import Estimator, Half, Metric
from ray_ensemble.estimator.predict import Estimate
from ray_ensemble.grouping.cases import parse_partition
from ray_ensemble.grouping.fitlog import FitLog
from ray_ensemble.grouping.harm import Harm, harmful
from ray_ensemble.grouping.objective import objective, paired, task_values
from ray_ensemble.grouping.partitions import Partition
from ray_ensemble.grouping.unlearnt import Unlearnt, unlearnt

Row = dict[str, Any]


@dataclass(frozen=True)
class SearchResult:
    """What the search found.

    - `groups` are task names and `partition` their indices, in the order of the groups' first tasks;
    - `objective` is on the report half of the validation data, `search_objective` on the half that was searched on,
      as is all that is called so below; both are mean loss in nats, or for `metric` accuracy as `Estimator.objective`
      says, plus `price` · m;
    - `rule` tells how m was chosen: `best`, or `one_standard_error` (see `choose`);
    - `estimates` has each task's estimate under its group, on the report half;
    - `references` has the objectives of one group of everything (`together`) and of a group each (`alone`), on both halves;
    - `by_m` has a row for each number of groups, to plot: `m`, `trials`, best `search_objective`, `mean`, `std` and `worst`
      over trials, `objective` of the best, and on the search half `difference`, the objective of the best at this m minus
      that of the best of all, with its `standard_error`, paired over tasks;
    - `harmful` names the tasks that every group is better without, the worst first (`harm.harmful`), and `unlearnt`
      those that training is not estimated to teach anything (`unlearnt.unlearnt`);
    - `fits` counts the distinct groups estimated and `flops` the operations of them, of reassignment and of the choice of λ,
      whether they were done in this call or before a stop; `seconds` are of this call,
      and `peak_memory_bytes` is the largest resident set of any one process, this one or a trial's.
    """

    groups: tuple[tuple[str, ...], ...]
    partition: Partition
    m: int
    objective: float
    search_objective: float
    metric: Metric
    price: float
    rule: str
    method: str
    seed: int
    regularization: float
    estimates: dict[str, Estimate]
    references: dict[str, dict[str, float]]
    by_m: tuple[dict[str, Any], ...]
    harmful: tuple[Harm, ...]
    unlearnt: tuple[Unlearnt, ...]
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
            "price": self.price,
            "rule": self.rule,
            "regularization": self.regularization,
            "estimates": {
                name: {"loss": found.loss, "accuracy": found.accuracy} for name, found in self.estimates.items()
            },
            "references": self.references,
            "by_m": list(self.by_m),
            "harmful": [asdict(harm) for harm in self.harmful],
            "unlearnt": [asdict(each) for each in self.unlearnt],
            "trials": self.trials,
            "fits": self.fits,
            "flops": self.flops,
        }


def best_result(
    table: Sequence[Row], estimator: Estimator, similarity: Affinity, fits: FitLog, search: SearchConfig
) -> SearchResult:
    """Pick the best trial of `table`, whose rows are what `cases.run_case` returns; at least one.

    The lowest objective rounded to 1e-9 wins; of equals the one with fewer groups, then the first in order of its partition.
    With `search.rule: one_standard_error` it only is what the best of every m is compared with (see `choose`). What is fitted
    here is added to `fits`.
    """

    def value(partition: Partition, half: Half = "search") -> float:
        return objective(estimator, partition, search.objective, search.price, half)

    by_m = tuple(_row_of(row, table, estimator, search) for row in best_rows(table))
    m = choose(by_m, search.rule)
    winner = next(row for row in best_rows(table) if row["m"] == m)
    partition = parse_partition(winner["partition"])
    names = [task.name for task in estimator.features]
    references: dict[str, Partition] = {
        "together": (tuple(range(len(names))),),
        "alone": tuple((task,) for task in range(len(names))),
    }
    harms = harmful(estimator, partition)
    fits.add(estimator.cache.values())
    spent = (fits.reference.flops if fits.reference else 0) + sum(int(row["reassignment_flops"]) for row in table)
    return SearchResult(
        groups=tuple(tuple(names[task] for task in group) for group in partition),
        partition=partition,
        m=len(partition),
        objective=value(partition, "report"),
        search_objective=float(winner["objective"]),
        metric=search.objective,
        price=search.price,
        rule=search.rule,
        method=str(winner["method"]),
        seed=int(winner["seed"]),
        regularization=estimator.regularization,
        estimates=dict(zip(names, estimator.tasks(partition, "report"), strict=True)),
        references={
            name: {"objective": value(reference, "report"), "search_objective": value(reference)}
            for name, reference in references.items()
        },
        by_m=by_m,
        harmful=harms,
        unlearnt=unlearnt(estimator, partition),
        affinity=similarity,
        trials=len(table),
        fits=len(fits.known),
        flops=spent + sum(estimate.flops for estimate in fits.known.values()),
    )


def choose(by_m: Sequence[Row], rule: str) -> int:
    """The number of groups: that of the best objective, or by `one_standard_error` the fewest within noise of it.

    A row is within noise where its `difference` is at most its own `standard_error` (Breiman et al. 1984, section 3.4.3,
    there of cross-validated trees; here paired, since the same tasks are estimated under either partition).
    """
    within = 1.0 if rule == "one_standard_error" else 0.0
    return min(int(row["m"]) for row in by_m if row["difference"] <= within * row["standard_error"])


def best_rows(table: Sequence[Row]) -> list[Row]:
    """The best trial of each number of groups, by m."""
    return [min((row for row in table if row["m"] == m), key=_rank) for m in sorted({int(row["m"]) for row in table})]


def _rank(row: Row) -> tuple[float, int, Partition]:
    return round(row["objective"], 9), row["m"], parse_partition(row["partition"])


def _row_of(best: Row, table: Sequence[Row], estimator: Estimator, search: SearchConfig) -> Row:
    """What `by_m` says of the m whose best trial is `best`."""
    winner = min(table, key=_rank)
    objectives = [float(row["objective"]) for row in table if row["m"] == best["m"]]
    partition, reference = parse_partition(best["partition"]), parse_partition(winner["partition"])
    metric = search.objective
    against = paired(task_values(estimator, partition, metric), task_values(estimator, reference, metric))
    return {
        "m": int(best["m"]),
        "trials": len(objectives),
        "search_objective": min(objectives),
        "mean": float(np.mean(objectives)),
        "std": float(np.std(objectives)),
        "worst": max(objectives),
        "objective": objective(estimator, partition, metric, search.price, "report"),
        "difference": against.difference + search.price * (len(partition) - len(reference)),
        "standard_error": against.standard_error,
    }
