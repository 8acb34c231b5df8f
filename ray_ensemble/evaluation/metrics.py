"""Measures on a split with their intervals, and paired differences between two models (numpy only).

Definitions (DESIGN section 2.1): loss is −log softmax(s)_y in nats, a hit is argmax s = y; macro-F1 and calibration error
are defined where they are computed. Intervals are 95% percentile bootstraps over examples, but for an accuracy on one task
(Wilson's) and a calibration error (`Resampled.interval`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
LEVEL = 0.95
BINS = 15  # of the calibration error
MEASURES = ("loss", "accuracy", "macro_f1", "ece")

_Z = 1.959963984540054  # standard normal quantile of 1 − (1 − LEVEL)/2
_CHUNK = 2**22  # drawn indices held at once; 32 MB


def losses_and_hits(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Per-example loss in nats and whether the highest score is the label's.

    Args:
        scores: (N, K) scores, larger is likelier; −inf for labels that a task does not have.
        labels: (N,) indices of the right labels.

    Returns:
        Losses (N,) float64 and hits (N,) bool. Of equal scores the first label counts as the prediction.

    Raises:
        ValueError: no examples, shapes that do not match, NaN or +inf, or a right label that is out of range or has
            a score of −inf.
    """
    s = np.asarray(scores, dtype=np.float64)
    y = np.asarray(labels)
    if s.ndim != 2 or y.shape != s.shape[:1]:
        raise ValueError(f"scores of shape {s.shape} do not go with labels of shape {y.shape}")
    if s.size == 0:
        raise ValueError("no examples to measure on")
    if not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"labels are indices, not {y.dtype}")
    if y.min() < 0 or y.max() >= s.shape[1]:
        raise ValueError(f"labels from {y.min()} to {y.max()} for {s.shape[1]} scores an example")
    if np.isnan(s).any() or np.isposinf(s).any():
        raise ValueError("scores hold NaN or +inf")
    rows = np.arange(len(y))
    right = s[rows, y]
    if np.isneginf(right).any():
        raise ValueError(f"example {int(np.argmax(np.isneginf(right)))} has a score of −inf for its right label")
    top = s.max(axis=1)  # (N,), finite, since the right label's score is
    losses = np.log(np.exp(s - top[:, None]).sum(axis=1)) - (right - top)
    # A rounding of 1e-17 below zero is no negative loss.
    return np.maximum(losses, 0.0), s.argmax(axis=1) == y


def metric(scores: ArrayLike, labels: ArrayLike, seed: int = 0) -> dict[str, Any]:
    """The measures of one task with 95% intervals, as `metrics.json` holds them; arguments as for `losses_and_hits`.

    Returns:
        `loss`, `accuracy`, `n`, `macro_f1` and `ece`; `loss_interval`, `macro_f1_interval` and `ece_interval` (bootstraps of
        2,000 resamples drawn with `seed`) and `accuracy_interval` (Wilson); plain Python numbers.
    """
    losses, hits = losses_and_hits(scores, labels)
    return {
        "loss": float(losses.mean()),
        "accuracy": float(hits.mean()),
        "n": len(losses),
        "loss_interval": bootstrap_interval([losses], seed),
        "accuracy_interval": wilson_interval(int(hits.sum()), len(hits)),
        **shape_measures([scores], [labels], seed),
    }


def shape_measures(scores: Sequence[ArrayLike], labels: Sequence[ArrayLike], seed: int = 0) -> dict[str, Any]:
    """`macro_f1` and `ece`, means over tasks, with `macro_f1_interval` and `ece_interval`; (N, K) and (N,) for each task."""
    found = resample([np.asarray(each)[None] for each in scores], labels, seed)
    told: dict[str, Any] = {measure: found.value(measure) for measure in MEASURES[2:]}
    return told | {f"{measure}_interval": found.interval(measure) for measure in MEASURES[2:]}


def macro_f1(scores: ArrayLike, labels: ArrayLike) -> float:
    """Mean over classes of F1 = 2·TP / (2·TP + FP + FN); arguments as for `losses_and_hits`.

    A class that is neither the label nor the prediction of any example does not count, as in scikit-learn's `f1_score`.
    """
    return float(_statistics(scores, labels).measures(None)[0, 2])


def calibration_error(scores: ArrayLike, labels: ArrayLike) -> float:
    """Expected calibration error of the top label (Guo et al. 2017, arXiv 1706.04599); arguments as for `losses_and_hits`.

    Examples are put into 15 bins of equal width by the probability p of their prediction, bin i for p in (i/15, (i+1)/15].
    The error is the sum over bins of |hits − Σ p| / N. With few examples it is above zero even for calibrated models.
    """
    return float(_statistics(scores, labels).measures(None)[0, 3])


@dataclass(frozen=True)
class _Statistics:
    """What the measures of one model on one task are sums of, a row an example."""

    sums: NDArray[
        np.float64
    ]  # (N, 2 + 2K + 15): loss, hit, label or prediction is k, both are k, and hit − p in each bin
    classes: int

    def measures(self, counts: NDArray[np.float64] | None) -> NDArray[np.float64]:
        """(B, 4): `MEASURES` where example i counts `counts[b, i]` times, of N in all; each once for None."""
        n = len(self.sums)
        totals = self.sums.sum(axis=0)[None] if counts is None else counts @ self.sums  # (B, N) @ (N, 2 + 2K + 15)
        either, both, bins = np.split(totals[:, 2:], [self.classes, 2 * self.classes], axis=1)
        # `either` counts an example twice that is label and prediction: 2·TP + FP + FN.
        f1 = np.divide(2.0 * both, either, out=np.zeros_like(both), where=either > 0)
        means = [totals[:, 0] / n, totals[:, 1] / n, f1.sum(axis=1) / (either > 0).sum(axis=1)]
        return np.stack([*means, np.abs(bins).sum(axis=1) / n], axis=1)


def _statistics(scores: ArrayLike, labels: ArrayLike) -> _Statistics:
    losses, hits = losses_and_hits(scores, labels)
    s, y = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    top = s.max(axis=1)
    confidence = 1.0 / np.exp(s - top[:, None]).sum(axis=1)  # in (0, 1]
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    label, predicted = np.eye(s.shape[1])[y], np.eye(s.shape[1])[s.argmax(axis=1)]
    gaps = np.eye(BINS)[bins] * (hits - confidence)[:, None]
    columns = [losses[:, None], hits[:, None], label + predicted, label * predicted, gaps]
    return _Statistics(np.concatenate(columns, axis=1), s.shape[1])


@dataclass(frozen=True)
class Resampled:
    """`MEASURES` of one model, means over tasks: of each of its R trainings, and of B resamples of examples and trainings."""

    trainings: NDArray[np.float64]  # (R, 4)
    draws: NDArray[np.float64]  # (B, 4)

    def value(self, measure: str) -> float:
        """Mean over trainings."""
        return float(self.trainings[:, MEASURES.index(measure)].mean())

    def interval(self, measure: str) -> list[float]:
        """95% interval: the percentile bootstrap; for `ece` the basic one, [2e − q₀.₉₇₅, 2e − q₀.₀₂₅] within [0, 1].

        A calibration error adds up absolute values, so a resample's is above the sample's by about as much as the sample's is
        above the truth (Davison and Hinkley 1997, section 2.4). The basic bootstrap takes that off.
        """
        low, high = _percentiles(self.draws[:, MEASURES.index(measure)])
        if measure != "ece":
            return [low, high]
        twice = 2.0 * self.value(measure)
        return [min(1.0, max(0.0, twice - high)), min(1.0, max(0.0, twice - low))]

    def minus(self, other: Resampled, measure: str) -> dict[str, Any]:
        """`difference` to another model resampled with the same seed, its percentile `interval`, and it `by_training`.

        Raises:
            ValueError: numbers of trainings differ.
        """
        if self.trainings.shape != other.trainings.shape:
            raise ValueError(f"{len(self.trainings)} trainings of one model, {len(other.trainings)} of the other")
        place = MEASURES.index(measure)
        each = self.trainings[:, place] - other.trainings[:, place]
        interval = list(_percentiles(self.draws[:, place] - other.draws[:, place]))
        return {"difference": float(each.mean()), "interval": interval, "by_training": each.tolist()}


def resample(
    scores: Sequence[ArrayLike], labels: Sequence[ArrayLike], seed: int = 0, resamples: int = RESAMPLES
) -> Resampled:
    """Bootstrap of all measures over examples within tasks and over trainings.

    A resample draws N examples of every task, the same ones for all trainings, and R trainings, the same ones for all tasks. Both
    depend on `seed` and on sizes alone, so that two models resampled alike are paired. Task i draws its examples as
    stratum i of `bootstrap_interval` does. With few trainings their part of the spread comes out short, by (R − 1)/R in variance.

    Args:
        scores: for each task (R, N, K) of R trainings, as for `losses_and_hits`.
        labels: for each task (N,).
        seed: of the draws.
        resamples: B.

    Raises:
        ValueError: no tasks, numbers that do not match, or as for `losses_and_hits`.
    """
    if not scores or len(scores) != len(labels):
        raise ValueError(f"scores of {len(scores)} tasks and labels of {len(labels)}")
    trainings = {np.asarray(each).shape[0] for each in scores}
    if len(trainings) != 1:
        raise ValueError(f"tasks have {', '.join(map(str, sorted(trainings)))} trainings")
    (count,) = trainings
    values, draws = np.zeros((count, len(MEASURES))), np.zeros((resamples, count, len(MEASURES)))
    for index, (task, right) in enumerate(zip(scores, labels, strict=True)):
        models = [_statistics(each, right) for each in np.asarray(task)]
        values += np.concatenate([model.measures(None) for model in models])
        done = 0
        for picks in _resamples(len(np.asarray(right)), resamples, [seed, index]):
            counts = _counts(picks)
            draws[done : done + len(picks)] += np.stack([model.measures(counts) for model in models], axis=1)
            done += len(picks)
    chosen = np.random.default_rng([seed, len(scores)]).integers(count, size=(resamples, count))
    mean = draws[np.arange(resamples)[:, None], chosen].mean(axis=1)  # (B, R, 4) -> (B, 4)
    return Resampled(values / len(scores), mean / len(scores))


def wilson_interval(hits: int, n: int) -> list[float]:
    """Wilson's 95% score interval of a share: `hits` out of `n`."""
    if not 0 <= hits <= n or n < 1:
        raise ValueError(f"{hits} hits out of {n}")
    share, square = hits / n, _Z**2
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = _Z * math.sqrt(share * (1 - share) / n + square / (4 * n**2)) / (1 + square / n)
    # At the ends the formula gives exactly 0 and 1, up to rounding.
    return [0.0 if hits == 0 else centre - half, 1.0 if hits == n else centre + half]


def bootstrap_interval(strata: Sequence[ArrayLike], seed: int = 0, resamples: int = RESAMPLES) -> list[float]:
    """95% percentile bootstrap interval of the mean over strata (tasks) of their means.

    Examples are redrawn within each stratum, so every stratum keeps its size. Stratum i draws from (seed, i) alone.
    """
    means = np.zeros(resamples)
    arrays = [_values(stratum) for stratum in strata]
    if not arrays:
        raise ValueError("no tasks to average over")
    for index, values in enumerate(arrays):
        drawn = [values[picks].mean(axis=1) for picks in _resamples(len(values), resamples, [seed, index])]
        means += np.concatenate(drawn)
    return list(_percentiles(means / len(arrays)))


def paired_difference(a: Sequence[ArrayLike], b: Sequence[ArrayLike], seed: int = 0) -> dict[str, Any]:
    """How much model a exceeds model b on the same examples: losses or hits, a per-example array a task.

    Args:
        a: for each task the per-example values of one model.
        b: the same of the other model, in the same order of tasks and examples.
        seed: of the bootstrap.

    Returns:
        `difference`, the mean over tasks of (mean a − mean b), and `interval`, its 95% percentile bootstrap: examples
        are redrawn within each task, the same ones for both models.

    Raises:
        ValueError: numbers of tasks or of examples differ, or there are none.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} tasks of one model against {len(b)} of the other")
    differences = []
    for index, (left, right) in enumerate(zip(a, b, strict=True)):
        first, second = _values(left), _values(right)
        if first.shape != second.shape:
            raise ValueError(f"task {index} has {len(first)} examples of one model and {len(second)} of the other")
        # Redrawing the same examples for both is redrawing their differences.
        differences.append(first - second)
    interval = bootstrap_interval(differences, seed)
    return {"difference": float(np.mean([each.mean() for each in differences])), "interval": interval}


def _percentiles(draws: NDArray[np.float64]) -> tuple[float, float]:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def _counts(picks: NDArray[np.int64]) -> NDArray[np.float64]:
    """How often each of n examples is in each of the resamples (rows, n)."""
    rows, n = picks.shape
    places = picks + n * np.arange(rows)[:, None]
    return np.bincount(places.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def _values(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"a task is a one-dimensional array of at least one example, not of shape {array.shape}")
    return array


def _resamples(n: int, resamples: int, seed: list[int]) -> Iterator[NDArray[np.int64]]:
    """Indices (rows, n) of `resamples` resamples in all, a block of rows at a time."""
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // n)
    for start in range(0, resamples, rows):
        yield generator.integers(n, size=(min(rows, resamples - start), n))
