"""How far fits on few validation examples are to be trusted: one strength for many datasets, by cross-fitting. No Ray here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]
Losses = NDArray[np.float64]

# Strengths that are tried, strongest first, in validation examples: with V of its own a dataset's fit is pulled towards what it
# would be without data by strength / V, so that one strength suits datasets of any size. Infinity: data have no say.
LADDER = (math.inf, 16.0, 4.0, 1.0, 0.0)
FOLDS = 5


@dataclass(frozen=True)
class Choice:
    """What held-out examples say of S strengths.

    - `losses` (S,): mean held-out losses in nats; empty where there was nothing to judge by;
    - `shares` (S,) of sum 1, in proportion to exp(−z²/2), z the distance from the best loss in standard errors of the difference:
      strengths that cannot be told apart count alike;
    - `strength`: the strongest within one standard error of the best.
    """

    ladder: tuple[float, ...]
    losses: tuple[float, ...]
    shares: tuple[float, ...]
    strength: float

    def described(self) -> dict[str, Any]:
        """For a JSON file, in which infinity is null."""
        return {
            "strength": _finite(self.strength),
            "tried": [
                {"strength": _finite(strength), "loss": loss, "share": share}
                for strength, loss, share in zip(self.ladder, self.losses, self.shares, strict=False)
            ],
        }


def fold_of(count: int, folds: int = FOLDS) -> NDArray[np.int64]:
    """The fold (count,) of each of `count` examples: sizes differ by one at most; always the same for the same count.

    Examples are shuffled first, since a file may alternate between labels.
    """
    order = np.random.Generator(np.random.PCG64(0)).permutation(count)
    found = np.empty(count, dtype=np.int64)
    found[order] = np.arange(count) % min(folds, count)
    return found


def cross_fitted(
    count: int,
    predict: Callable[[NDArray[np.int64], NDArray[np.int64], float], FloatArray],
    ladder: Sequence[float] = LADDER,
) -> NDArray[np.float64]:
    """Scores (S, count, K) of every example by fits that have not seen it, at each of S strengths.

    Args:
        count: examples of the dataset, at least two.
        predict: (n examples to fit on, j examples to judge, strength) -> scores (j, K) of the latter.
        ladder: the strengths.
    """
    fold = fold_of(count)
    places, found = [], []
    for part in range(fold.max() + 1):
        rest, judged = np.flatnonzero(fold != part), np.flatnonzero(fold == part)
        found.append(np.stack([predict(rest, judged, strength) for strength in ladder]))
        places.append(judged)
    return np.concatenate(found, axis=1, dtype=np.float64)[:, np.argsort(np.concatenate(places))]


def choose(losses: Sequence[Losses], ladder: Sequence[float] = LADDER) -> Choice:
    """Judge strengths by their mean held-out losses over datasets, each dataset counting the same.

    The standard error is that of the difference to the best, paired over examples. Pooling datasets is what makes the choice
    possible: one of 30 examples cannot tell one strength from another. `strength` is by the one-standard-error rule of Breiman
    et al. 1984 (Classification and Regression Trees, section 3.4.3).

    Args:
        losses: of each dataset (S, V) of cross-fitted scores; datasets of fewer than two examples have no say.
        ladder: the S strengths, strongest first; it is taken where nothing speaks against it.
    """
    known = [each for each in losses if each.shape[1] > 1]
    if not known:
        return Choice(tuple(ladder), (), (1.0,) + (0.0,) * (len(ladder) - 1), ladder[0])
    means = np.mean([each.mean(axis=1) for each in known], axis=0)  # (S,)
    best = int(means.argmin())
    apart = [each - each[best] for each in known]
    errors = np.sqrt(sum(each.var(axis=1, ddof=1) / each.shape[1] for each in apart)) / len(apart)
    behind = means - means[best]
    z = np.divide(behind, errors, out=np.where(behind > 0, np.inf, 0.0), where=errors > 0)
    shares = np.exp(-0.5 * z**2)
    strength = ladder[int(np.flatnonzero(z <= 1)[0])]
    return Choice(tuple(ladder), tuple(means.tolist()), tuple((shares / shares.sum()).tolist()), strength)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
