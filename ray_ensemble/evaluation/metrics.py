"""Loss and accuracy on a split with their intervals, and paired differences between two models (numpy only).

Definitions (DESIGN section 2.1): loss is −log softmax(s)_y in nats, a hit is argmax s = y. The interval of a loss and
of a difference is the 95% percentile bootstrap over examples, that of an accuracy is Wilson's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
LEVEL = 0.95

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
    """Mean loss and accuracy with 95% intervals, as `metrics.json` holds them; arguments as for `losses_and_hits`.

    Returns:
        `loss`, `accuracy`, `n`, `loss_interval` (percentile bootstrap of 2,000 resamples drawn with `seed`) and
        `accuracy_interval` (Wilson); plain Python numbers.
    """
    losses, hits = losses_and_hits(scores, labels)
    return {
        "loss": float(losses.mean()),
        "accuracy": float(hits.mean()),
        "n": len(losses),
        "loss_interval": bootstrap_interval([losses], seed),
        "accuracy_interval": wilson_interval(int(hits.sum()), len(hits)),
    }


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
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means / len(arrays), [tail, 1 - tail])
    return [float(low), float(high)]


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
