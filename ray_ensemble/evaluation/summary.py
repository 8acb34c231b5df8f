"""The table of a run: every model on every dataset, the means, and paired differences against one adapter on everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_ensemble.evaluation.metrics import bootstrap_interval, losses_and_hits, metric, paired_difference

_Values = Sequence[tuple[NDArray[np.float64], NDArray[np.bool_]]]

_COMPARED = (
    ("ensemble", "qlora_all"),
    ("group", "qlora_all"),
    ("merged", "ensemble"),
    ("ensemble", "ensemble_unboosted"),
)


def summarise(
    outputs: Mapping[str, Mapping[str, NDArray[Any]]], labels: Mapping[str, NDArray[np.integer[Any]]], seed: int = 0
) -> dict[str, Any]:
    """The `tasks`, `mean` and `paired` parts of `metrics.json`; merged against unmerged is there for every task too.

    Args:
        outputs: task -> model -> scores (N, K) on the test split.
        labels: task -> (N,).
        seed: of the bootstrap.
    """
    tasks = {
        name: {model: metric(scores, labels[name], seed) for model, scores in models.items()}
        for name, models in outputs.items()
    }
    models = list(next(iter(tasks.values())))
    mean = {model: _mean([tasks[name][model] for name in tasks]) for model in models}
    measured = {model: [losses_and_hits(outputs[name][model], labels[name]) for name in outputs] for model in models}
    for model, values in measured.items():
        mean[model]["loss_interval"] = bootstrap_interval([losses for losses, _ in values], seed)
        mean[model]["accuracy_interval"] = bootstrap_interval([hits for _, hits in values], seed)
    paired: dict[str, dict[str, Any]] = {}
    for ours, other in _COMPARED:
        if other in models:
            paired[f"{ours}_vs_{other}"] = _compared(measured[ours], measured[other], seed)
    if "merged" in models:
        each = zip(outputs, measured["merged"], measured["ensemble"], strict=True)
        paired["merged_vs_ensemble"]["tasks"] = {name: _compared([a], [b], seed) for name, a, b in each}
    return {"tasks": tasks, "mean": mean, "paired": paired}


def _compared(ours: _Values, other: _Values, seed: int) -> dict[str, Any]:
    """Paired differences of loss and accuracy, from losses and hits of each task."""
    return {
        "loss": paired_difference([losses for losses, _ in ours], [losses for losses, _ in other], seed),
        "accuracy": paired_difference([hits for _, hits in ours], [hits for _, hits in other], seed),
    }


def _mean(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "loss": float(np.mean([m["loss"] for m in metrics])),
        "accuracy": float(np.mean([m["accuracy"] for m in metrics])),
        "n": sum(m["n"] for m in metrics),
    }
