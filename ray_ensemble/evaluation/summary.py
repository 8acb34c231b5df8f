"""The table of a run: every model on every dataset, the means, and paired differences against one adapter on everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_ensemble.evaluation.metrics import (
    bootstrap_interval,
    losses_and_hits,
    metric,
    paired_difference,
    shape_measures,
)

_COMPARED = (
    ("ensemble", "qlora_all"),
    ("group", "qlora_all"),
    ("merged", "ensemble"),
    ("ensemble", "ensemble_unboosted"),
)


def summarise(
    outputs: Mapping[str, Mapping[str, NDArray[Any]]], labels: Mapping[str, NDArray[np.integer[Any]]], seed: int = 0
) -> dict[str, Any]:
    """The `tasks`, `mean` and `paired` parts of `metrics.json`.

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
    for model in models:
        values = [losses_and_hits(outputs[name][model], labels[name]) for name in outputs]
        mean[model]["loss_interval"] = bootstrap_interval([losses for losses, _ in values], seed)
        mean[model]["accuracy_interval"] = bootstrap_interval([hits for _, hits in values], seed)
        mean[model] |= shape_measures(
            [outputs[name][model] for name in outputs], [labels[name] for name in outputs], seed
        )
    paired = {}
    for ours, other in _COMPARED:
        if other not in models:
            continue
        pair = {}
        for place, what in enumerate(("loss", "accuracy")):
            a = [losses_and_hits(outputs[name][ours], labels[name])[place] for name in outputs]
            b = [losses_and_hits(outputs[name][other], labels[name])[place] for name in outputs]
            pair[what] = paired_difference(a, b, seed)
        paired[f"{ours}_vs_{other}"] = pair
    return {"tasks": tasks, "mean": mean, "paired": paired}


def _mean(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "loss": float(np.mean([m["loss"] for m in metrics])),
        "accuracy": float(np.mean([m["accuracy"] for m in metrics])),
        "n": sum(m["n"] for m in metrics),
    }
