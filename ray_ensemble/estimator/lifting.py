"""A fit as weights on training examples, from which a direction in the adapter's own space follows (DESIGN section 2.3).

At the optimum of the fit 2λβ = Σ_x w_x Σ_k p_k φ_k, p_k the fitted share of the wrong label k. The same sum over the unprojected
gradients, Δθ = Σ_x w_x Σ_k p_k ∇(s_y − s_k) / 2λ, is a step of the adapter: one weighted backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ray_ensemble.estimator.features import FloatArray, TaskFeatures
from ray_ensemble.estimator.loss import softplus

Vector = NDArray[np.float64]


def lifting_shares(
    features: Sequence[TaskFeatures], members: Sequence[int], beta: Vector, weights: FloatArray
) -> list[NDArray[np.float64]]:
    """For every member the weights w_x p_k (N, R) of its training rows under β, R rows an example.

    `weights` (N of all members,) are those of the fit. Divided by 2λ they sum the rows' gradients to the fitted step.
    """
    shares, first = [], 0
    for task in members:
        rows = features[task]
        fitted = rows.train_margins + rows.train_features @ beta
        each = len(fitted) // rows.examples
        total = np.logaddexp.reduceat(-fitted, rows.starts)
        own = np.exp(-fitted - np.repeat(softplus(total), each)).reshape(rows.examples, each)
        shares.append((own * weights[first : first + rows.examples, None]).astype(np.float64))
        first += rows.examples
    return shares
