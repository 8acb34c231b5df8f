"""Estimates held against real fine-tuning: the errors and correlations of DESIGN section 2, on plain arrays.

A point is a task i of a subset S that was really fine-tuned. All measures are means over points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from ray_ensemble.estimator.predict import Estimate

Vector = NDArray[np.float64]

RESAMPLES = 1000
LEVEL = 0.95
CALIBRATION_DRAWS = 200
CALIBRATION_SUBSETS = 4


@dataclass(frozen=True)
class Point:
    """Task `task` of the subset `subset`: estimated, really reached (one for each seed, the first one is compared), and base.

    `along` are the estimates at other λ, the same for all points, which a calibration can choose from.
    """

    subset: tuple[int, ...]
    task: int
    estimated: Estimate
    true: tuple[Estimate, ...]
    base: Estimate
    along: tuple[Estimate, ...] = ()


def compare(points: Sequence[Point], seed: int = 0) -> dict[str, Any]:
    """What `validation.json` says of the estimate's errors (DESIGN section 2, "Errors, defined once").

    - `loss_error`, `accuracy_error`: mean |estimated − true| / true; accuracies of zero are left out of the second,
      which is None where all are;
    - `accuracy_error_points`: mean |estimated − true| accuracy, in points;
    - `loss_error_calibrated`: of losses at the λ, and with their change from the base scaled by the number, that are best on
      `CALIBRATION_SUBSETS` real runs, measured on the others, mean over draws of these runs; None where there are too few;
    - `spearman`: rank correlation over all points after each task's mean is taken off estimate and truth, with its
      bootstrap interval over subsets, and `spearman_by_task`;
    - `seed_to_seed`: the same figures of a second seed's truth in place of the estimate, the ceiling of any estimate; None
      without repeated subsets.

    Fewer than one point is a `ValueError`.
    """
    if not points:
        raise ValueError("nothing was really fine-tuned, so there is nothing to compare")
    estimated, true = _losses(p.estimated for p in points), _losses(p.true[0] for p in points)
    hit, really = _accuracies(p.estimated for p in points), _accuracies(p.true[0] for p in points)
    tasks = np.array([p.task for p in points])
    found: dict[str, Any] = {
        "points": len(points),
        "subsets": len({p.subset for p in points}),
        "loss_error": _relative(estimated, true),
        "loss_error_calibrated": calibrated_error(points, seed=seed),
        "accuracy_error": _relative(hit, really) if really.any() else None,
        "accuracy_error_points": float(np.mean(np.abs(hit - really)) * 100),
        "spearman": within_spearman(estimated, true, tasks),
        "spearman_interval": _interval(points, seed),
        "spearman_by_task": {
            int(task): _rank_correlation(estimated[tasks == task], true[tasks == task]) for task in np.unique(tasks)
        },
        "spearman_accuracy": within_spearman(hit, really, tasks),
        "pearson": float(np.corrcoef(estimated, true)[0, 1]) if len(points) > 1 else None,
    }
    found["seed_to_seed"] = _ceiling([p for p in points if len(p.true) > 1], points)
    return found


def within_spearman(estimated: Vector, true: Vector, tasks: NDArray[np.int_]) -> float | None:
    """Spearman's ρ over all points after each task's mean is taken off both sides; None where a side is constant."""
    return _rank_correlation(_centred(estimated, tasks), _centred(true, tasks))


def fit_scale(estimated: Vector, true: Vector, base: Vector) -> float:
    """The number a ≥ 0 with which base + a·(estimated − base) is nearest to the truth, in relative error (least squares)."""
    change, want = (estimated - base) / true, (true - base) / true
    square = float(change @ change)
    return max(float(change @ want) / square, 0.0) if square > 0 else 1.0


def calibrated_error(points: Sequence[Point], subsets: int = CALIBRATION_SUBSETS, seed: int = 0) -> float | None:
    """Mean relative error of losses calibrated (λ and `fit_scale`) on `subsets` real runs, on the points of all the others."""
    groups = sorted({p.subset for p in points})
    if len(groups) <= subsets:
        return None
    generator = np.random.default_rng(seed)
    _, true, base = _triple(points)
    # (1 + λ, points): the estimates as they are, and those along the path
    candidates = np.stack([_losses(each) for each in zip(*((p.estimated, *p.along) for p in points), strict=True)])
    errors = []
    for _ in range(CALIBRATION_DRAWS):
        chosen = {groups[i] for i in generator.choice(len(groups), subsets, replace=False)}
        known = np.array([p.subset in chosen for p in points])
        fitted = []
        for estimated in candidates:
            scale = fit_scale(estimated[known], true[known], base[known])
            calibrated = base + scale * (estimated - base)
            fitted.append((_relative(calibrated[known], true[known]), _relative(calibrated[~known], true[~known])))
        errors.append(min(fitted)[1])
    return float(np.mean(errors))


def _ceiling(repeated: Sequence[Point], points: Sequence[Point]) -> dict[str, Any] | None:
    if not repeated:
        return None
    first, second = _losses(p.true[0] for p in repeated), _losses(p.true[1] for p in repeated)
    hits, again = _accuracies(p.true[0] for p in repeated), _accuracies(p.true[1] for p in repeated)
    # The mean of all of a task's runs is taken off, since few points of a task are repeated.
    means = {
        task: float(np.mean([p.true[0].loss for p in points if p.task == task])) for task in {p.task for p in repeated}
    }
    level = np.array([means[p.task] for p in repeated])
    noise = float(np.mean((first - second) ** 2) / 2)
    tasks = np.array([p.task for p in points])
    spread = _centred(_losses(p.true[0] for p in points), tasks)
    freedom = len(points) - len(np.unique(tasks))
    variance = float(spread @ spread) / freedom if freedom > 0 else 0.0
    return {
        "points": len(repeated),
        "loss_error": _relative(second, first),
        "accuracy_error": _relative(again, hits) if hits.any() else None,
        "accuracy_error_points": float(np.mean(np.abs(again - hits)) * 100),
        "spearman": _rank_correlation(second - level, first - level),
        "loss_deviation": float(np.sqrt(noise)),
        # The share of the variance within tasks that another seed would not change.
        "reliability": max(0.0, 1.0 - noise / variance) if variance > 0 else None,
    }


def _interval(points: Sequence[Point], seed: int) -> list[float] | None:
    """95% percentile bootstrap of `within_spearman`; whole subsets are redrawn, since their points share an adapter."""
    groups = sorted({p.subset for p in points})
    by_group = {group: [p for p in points if p.subset == group] for group in groups}
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(RESAMPLES):
        drawn = [p for i in generator.integers(len(groups), size=len(groups)) for p in by_group[groups[i]]]
        value = within_spearman(
            _losses(p.estimated for p in drawn), _losses(p.true[0] for p in drawn), np.array([p.task for p in drawn])
        )
        if value is not None:
            found.append(value)
    if not found:
        return None
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return [float(low), float(high)]


def _triple(points: Sequence[Point]) -> tuple[Vector, Vector, Vector]:
    return _losses(p.estimated for p in points), _losses(p.true[0] for p in points), _losses(p.base for p in points)


def _losses(estimates: Any) -> Vector:
    return np.array([e.loss for e in estimates], dtype=np.float64)


def _accuracies(estimates: Any) -> Vector:
    return np.array([e.accuracy for e in estimates], dtype=np.float64)


def _relative(estimated: Vector, true: Vector) -> float:
    positive = true > 0
    return float(np.mean(np.abs(estimated - true)[positive] / true[positive]))


def _centred(values: Vector, tasks: NDArray[np.int_]) -> Vector:
    found = values.copy()
    for task in np.unique(tasks):
        found[tasks == task] -= values[tasks == task].mean()
    return found


def _rank_correlation(a: Vector, b: Vector) -> float | None:
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(spearmanr(a, b).statistic)
