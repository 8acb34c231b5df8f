"""What the estimate says of the partitions that `classify10.py` trained, to be held against what they reached.

Both are differences from all datasets together: the estimate's from its own figure for that, the real one from one QLoRA with a
fitted scale, since the partitions' ensembles have scales too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from classify10_experiment import Experiment
from numpy.typing import NDArray

from ray_ensemble.estimator import Estimator


class Estimates:
    """The estimator of each seed's search, made once.

    Args:
        experiment: its folder has the gradients and the searches, unless its records are from another one; `known` tells.
        seeds: how many there are.
    """

    def __init__(self, experiment: Experiment, seeds: int) -> None:
        self._experiment, self._seeds = experiment, range(seeds)
        self._estimators: dict[int, Estimator] = {}

    @property
    def known(self) -> bool:
        """Whether gradients and searches are there."""
        experiment = self._experiment
        partitions = (experiment.path / "partitions" / f"found-{seed}" / "partition.json" for seed in self._seeds)
        return experiment.job.folder.finished("gradients") and all(path.exists() for path in partitions)

    def beside(self, costs: Sequence[Mapping[str, Any]], real: NDArray[np.float64]) -> dict[str, Any]:
        """The estimated loss of an arm's groups less that of all together, means over seeds, and how far tasks are in its order.

        Args:
            costs: the arm's record of each seed, which has its groups.
            real: loss of the arm less that of one QLoRA, in nats: (R, n) for R seeds and n tasks.

        Returns:
            `search` on what the search looks at and `held_out` on the half of the validation examples that it does not see, in
            nats; `correlation` (Pearson) over tasks of the mean of the two with the mean of `real` over seeds; and
            `between_seeds`, that of `real` with one seed and with another, mean over pairs of seeds, which no estimate can be
            expected to exceed by much. None where there is none.
        """
        halves: dict[str, NDArray[np.float64]] = {}
        for half in ("search", "report"):
            halves[half] = np.mean(
                [self._difference(seed, cost["about"]["groups"], half) for seed, cost in enumerate(costs)], axis=0
            )
        whole = (halves["search"] + halves["report"]) / 2
        pairs = [_correlation(one, other) for one, other in combinations(real, 2)]
        known = [each for each in pairs if each is not None]
        return {
            "search": float(halves["search"].mean()),
            "held_out": float(halves["report"].mean()),
            "correlation": _correlation(whole, real.mean(axis=0)),
            "between_seeds": float(np.mean(known)) if known else None,
        }

    def _difference(self, seed: int, groups: Sequence[Sequence[str]], half: Any) -> NDArray[np.float64]:
        names, estimator = self._experiment.names, self._of(seed)
        partition = [[names.index(task) for task in group] for group in groups]
        found = [
            np.array([each.loss for each in estimator.tasks(chosen, half)])
            for chosen in (partition, [range(len(names))])
        ]
        return np.asarray(found[0] - found[1])

    def _of(self, seed: int) -> Estimator:
        if seed not in self._estimators:
            experiment = self._experiment
            first = next(iter(self._estimators.values()), None)
            features = first.features if first else experiment.job.features()
            self._estimators[seed] = Estimator(
                features, experiment.config.training, experiment.found(seed)["regularization"]
            )
        return self._estimators[seed]


def _correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float | None:
    """Pearson's, None where either does not vary."""
    return float(np.corrcoef(one, other)[0, 1]) if np.ptp(one) > 0 and np.ptp(other) > 0 else None
