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
LADDER = (math.inf, 64.0, 16.0, 4.0, 1.0, 0.0)
FOLDS = 5


@dataclass(frozen=True)
class Choice:
    """A chosen strength, its place in what was tried, and the mean held-out loss (S,) in nats of everything tried."""

    strength: float
    place: int
    losses: tuple[float, ...]

    def described(self, ladder: Sequence[float] = LADDER) -> dict[str, Any]:
        """For a JSON file, in which infinity is null."""
        return {
            "strength": _finite(self.strength),
            "tried": [
                {"strength": _finite(strength), "loss": loss}
                for strength, loss in zip(ladder, self.losses, strict=False)
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
    held_out: Callable[[NDArray[np.int64], NDArray[np.int64], float], FloatArray],
    ladder: Sequence[float] = LADDER,
) -> Losses:
    """Losses (S, count) of every example under fits that have not seen it, for each of S strengths; (S, 0) for fewer than two.

    Args:
        count: examples of the dataset.
        held_out: (examples to fit on, examples to judge, strength) -> losses of the latter.
        ladder: the strengths.
    """
    if count < 2:
        return np.zeros((len(ladder), 0))
    losses = np.empty((len(ladder), count))
    fold = fold_of(count)
    for part in range(fold.max() + 1):
        rest, judged = np.flatnonzero(fold != part), np.flatnonzero(fold == part)
        for place, strength in enumerate(ladder):
            losses[place, judged] = held_out(rest, judged, strength)
    return losses


def choose(losses: Sequence[Losses], ladder: Sequence[float] = LADDER) -> Choice:
    """The strongest shrinkage whose mean held-out loss is within one standard error of the best.

    The mean is over datasets, each counting the same, and the standard error that of the difference to the best, paired over
    examples (the one-standard-error rule of Breiman et al. 1984, Classification and Regression Trees, section 3.4.3). Pooling
    datasets is what makes the choice possible: one of 30 examples cannot tell one strength from another.

    Args:
        losses: of each dataset (S, V), from `cross_fitted`; datasets without any have no say.
        ladder: the S strengths, strongest first; it is taken where nothing speaks against it.
    """
    known = [each for each in losses if each.shape[1] > 1]
    if not known:
        return Choice(ladder[0], 0, ())
    means = np.mean([each.mean(axis=1) for each in known], axis=0)  # (S,)
    best = int(means.argmin())
    for place, strength in enumerate(ladder):
        apart = [each[place] - each[best] for each in known]
        error = math.sqrt(sum(each.var(ddof=1) / len(each) for each in apart)) / len(apart)
        if means[place] - means[best] <= error:
            return Choice(strength, place, tuple(means.tolist()))
    raise AssertionError("the best is within any distance of itself")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
