"""Which dataset an input is of, by logistic regression on the base's hidden states. No Ray here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.special import log_softmax, softmax

from ray_ensemble.errors import InputError
from ray_ensemble.files import read_json, whole_folder, write_json

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]

GRID = (1e-3, 1e-2, 1e-1, 1.0)  # of the inverse penalty on the coefficients, per standardised state
_NEGLIGIBLE = 1e-2  # a smaller probability is set to zero, which saves its dataset's adapters' passes


@dataclass(frozen=True, eq=False)
class Router:
    """p(dataset | state) = softmax(((h − centre)/scale) · coefficients + intercepts).

    - `tasks`: names of the n datasets;
    - `coefficients` (H, n), `intercepts` (n,), `centre` and `scale` (H,), all float32;
    - `mixture`: whether an input gets the datasets' weights by their probabilities, or those of the likeliest alone.
    """

    tasks: tuple[str, ...]
    coefficients: FloatArray
    intercepts: FloatArray
    centre: FloatArray
    scale: FloatArray
    mixture: bool

    def probabilities(self, states: FloatArray) -> NDArray[np.float64]:
        """(N, n) of states (N, H)."""
        logits = (states - self.centre) / self.scale @ self.coefficients + self.intercepts  # (N, H) @ (H, n)
        found: NDArray[np.float64] = softmax(logits.astype(np.float64), axis=1)
        return found

    def shares(self, states: FloatArray) -> NDArray[np.float64]:
        """What an input takes of each dataset's weights: (N, n), rows of sum 1. See `mixture`."""
        return shares(self.probabilities(states), self.mixture)

    def save(self, folder: Path) -> None:
        """Write `router.safetensors` and `router.json`, whole or not at all."""
        arrays = {
            name: np.ascontiguousarray(getattr(self, name), dtype=np.float32)
            for name in ("coefficients", "intercepts", "centre", "scale")
        }
        with whole_folder(folder) as temporary:
            save_file(arrays, temporary / "router.safetensors")
            about = {"tasks": list(self.tasks), "mixture": self.mixture, "input": "mean over tokens of the bare text"}
            write_json(temporary / "router.json", about)

    @classmethod
    def load(cls, folder: Path) -> Router:
        """Read what `save` wrote.

        Raises:
            InputError: a file is missing or damaged.
        """
        about = read_json(folder / "router.json", "router")
        try:
            arrays = load_file(folder / "router.safetensors")
            return cls(tuple(about["tasks"]), mixture=bool(about["mixture"]), **arrays)
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise InputError(f"{folder / 'router.safetensors'}: this router cannot be read ({error})") from None


def shares(probabilities: NDArray[np.float64], mixture: bool) -> NDArray[np.float64]:
    """Rows (N, n) of sum 1: the probabilities without those under 1%, or all of it on the likeliest dataset."""
    likeliest = probabilities == probabilities.max(axis=1, keepdims=True)
    kept = np.where(likeliest | (mixture & (probabilities >= _NEGLIGIBLE)), probabilities, 0.0)
    found: NDArray[np.float64] = kept / kept.sum(axis=1, keepdims=True)
    return found


def fit_router(train: Mapping[str, FloatArray], held_out: Mapping[str, FloatArray]) -> Router:
    """Multinomial logistic regression in which every dataset counts the same, with the penalty of least held-out loss.

    Args:
        train: dataset -> states (N, H) of training inputs.
        held_out: dataset -> states (V, H) of others, in the same order of datasets.

    Returns:
        A router with `mixture` true; whether that is best, scores have to tell.
    """
    tasks = tuple(train)
    states, target = _stacked(list(train.values()))
    centre, scale = states.mean(axis=0), states.std(axis=0)
    scale = np.where(scale > 1e-6 * scale.max(initial=1e-12), scale, 1.0)
    if len(tasks) == 1:
        return Router(tasks, np.zeros((states.shape[1], 1)), np.zeros(1), centre, scale, True)
    from sklearn.linear_model import LogisticRegression

    found = []
    for penalty in GRID:
        model = LogisticRegression(C=penalty, class_weight="balanced", max_iter=500)
        model.fit((states - centre) / scale, target)
        coefficients, intercepts = model.coef_.T, model.intercept_  # (H, n), (n,)
        if len(tasks) == 2:
            coefficients = np.hstack([np.zeros_like(coefficients), coefficients])
            intercepts = np.concatenate([[0.0], intercepts])
        found.append(Router(tasks, coefficients, intercepts, centre, scale, True))
    return min(found, key=lambda router: _loss(router, held_out))


def _stacked(states: Sequence[FloatArray]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    target = np.repeat(np.arange(len(states)), [len(each) for each in states])
    return np.concatenate(states).astype(np.float64), target


def _loss(router: Router, held_out: Mapping[str, FloatArray]) -> float:
    """Mean over datasets of −log of the right dataset's probability."""
    logs = [
        np.log(np.maximum(router.probabilities(states)[:, place], 1e-12)).mean()
        for place, states in enumerate(held_out.values())
    ]
    return -float(np.mean(logs))


def mix(scores: FloatArray, shares_of_adapters: FloatArray) -> NDArray[np.float64]:
    """Scores (N, K) of inputs that each have coefficients of their own.

    Args:
        scores: (C, N, K) raw label scores of C adapters; where an input's coefficient is zero they may hold anything.
        shares_of_adapters: (N, C).
    """
    values = log_softmax(scores.astype(np.float64), axis=2)
    values[shares_of_adapters.T == 0] = 0.0
    found: NDArray[np.float64] = np.einsum("nc,cnk->nk", shares_of_adapters, values)
    return found
