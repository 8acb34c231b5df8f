"""What the estimate says of the partitions that `classify10.py` trained, to be held against what they reached.

Both are differences from all datasets together: the estimate's from its own figure for that, the real one from one QLoRA with a
fitted scale, since the partitions' ensembles have scales too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
from classify10_experiment import Experiment
from numpy.typing import NDArray

from ray_ensemble.estimator import Estimator
from ray_ensemble.estimator.estimator import Half

Losses = NDArray[np.float64]
HALVES: tuple[Half, Half] = ("search", "report")


class Estimates:
    """The estimator of each seed's search, made once.

    Args:
        experiment: its folder has the gradients and the searches, unless its records are from another one; `known` tells.
        seeds: how many there are.
    """

    def __init__(self, experiment: Experiment, seeds: int) -> None:
        self._experiment, self._seeds = experiment, seeds

    @cached_property
    def known(self) -> bool:
        """Whether gradients and searches are there."""
        experiment = self._experiment
        searches = (experiment.path / "partitions" / f"found-{seed}" for seed in range(self._seeds))
        return experiment.job.folder.finished("gradients") and all(
            (search / "partition.json").exists() for search in searches
        )

    def difference(self, costs: Sequence[Mapping[str, Any]], half: Half) -> Losses:
        """Estimated loss (n,) of each task in an arm's groups less that with all together, in nats, mean over seeds.

        Args:
            costs: the arm's record of each seed, which has its groups.
            half: `search` for what the search looks at, `report` for the half of the validation examples that it does not see.
        """
        names = self._experiment.names
        by_seed = []
        for estimator, cost in zip(self._estimators, costs, strict=True):
            groups = [[names.index(task) for task in group] for group in cost["about"]["groups"]]
            apart, together = (
                np.array([task.loss for task in estimator.tasks(partition, half)])
                for partition in (groups, [range(len(names))])
            )
            by_seed.append(apart - together)
        return np.asarray(np.mean(by_seed, axis=0))

    @cached_property
    def _estimators(self) -> list[Estimator]:
        experiment, features = self._experiment, self._experiment.job.features()
        found = (experiment.found(seed)["regularization"] for seed in range(self._seeds))
        return [Estimator(features, experiment.config.training, regularization) for regularization in found]


def agreement(search: Losses, held_out: Losses, real: Losses) -> dict[str, float | None]:
    """How differences of loss that were estimated agree with real ones.

    Args:
        search: (n,) for n tasks, in nats, on what the search looks at.
        held_out: (n,), on the validation examples that it does not see.
        real: (R, n) for R training seeds, on test.

    Returns:
        `search` and `held_out`, means over tasks; `correlation` (Pearson) over tasks of the mean of the two with the mean of
        `real` over seeds; and `between_seeds`, that of `real` with one seed and with another, mean over pairs of seeds, which no
        estimate can be expected to exceed by much. None where one of the two does not vary, or there is one seed.
    """
    pairs = [_correlation(one, other) for one, other in combinations(real, 2)]
    varied = [each for each in pairs if each is not None]
    return {
        "search": float(search.mean()),
        "held_out": float(held_out.mean()),
        "correlation": _correlation((search + held_out) / 2, real.mean(axis=0)),
        "between_seeds": float(np.mean(varied)) if varied else None,
    }


def _correlation(one: Losses, other: Losses) -> float | None:
    return float(np.corrcoef(one, other)[0, 1]) if np.ptp(one) > 0 and np.ptp(other) > 0 else None
