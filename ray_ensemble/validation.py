"""`validate`: really fine-tune sampled subsets of the tasks and hold the estimate against them (DESIGN section 2).

Subsets are the first of those that the affinity samples. Truth is taken on the validation examples that the estimate speaks
of, so that what is measured is the estimate and not the draw of examples; the test split stays untouched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_ensemble.errors import InputError
from ray_ensemble.estimator import Estimate, Estimator, estimate_task, sample_subsets
from ray_ensemble.estimator.comparison import Point, compare
from ray_ensemble.evaluation.metrics import losses_and_hits
from ray_ensemble.files import write_json
from ray_ensemble.real_runs import RealRun, fine_tune
from ray_ensemble.stages import Stages

FORMAT = 1


def validate(stages: Stages, subsets: int, repeats: int) -> dict[str, Any]:
    """Fine-tune `subsets` subsets, the first `repeats` of them with a second seed too, and write `validation.json`.

    Raises:
        InputError: more repeats than subsets, or fewer than one subset.
        RunError: a fine-tuning failed; the others are kept.
    """
    if subsets < 1:
        raise InputError(f"--subsets {subsets}: at least one subset has to be fine-tuned")
    if not 0 <= repeats <= subsets:
        raise InputError(f"--repeats {repeats}: 0 to {subsets}, the number of subsets")
    estimator = stages.estimator()
    settings = stages.config.estimator
    drawn = sample_subsets(len(estimator), max(settings.subsets, subsets), settings.subset_size, settings.seed)[
        :subsets
    ]
    wanted = [(members, seed) for place, members in enumerate(drawn) for seed in ((0, 1) if place < repeats else (0,))]
    runs = fine_tune(stages, wanted)
    names = [task.name for task in estimator.features]
    points = measured_points(estimator, runs)
    found = compare(points)
    found["spearman_by_task"] = {names[task]: value for task, value in found["spearman_by_task"].items()}
    found |= {
        "format": FORMAT,
        "split": "validation",
        "regularization": estimator.regularization,
        "steps": [run.steps for run in runs if run.seed == 0],
        "table": [_row(point, names) for point in points],
    }
    write_json(stages.folder / "validation.json", found)
    return found


def measured_points(estimator: Estimator, runs: Sequence[RealRun]) -> list[Point]:
    """Estimates and truths of every (subset, task), on all validation examples of the task."""
    by_subset: dict[tuple[int, ...], list[RealRun]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        by_subset.setdefault(run.members, []).append(run)
    points = []
    for members, repeated in by_subset.items():
        fit, _ = estimator.fit(members)
        for task in members:
            features = estimator.features[task]
            everything = np.arange(len(features.validation_labels))
            points.append(
                Point(
                    subset=members,
                    task=task,
                    estimated=estimate_task(fit.beta, features, everything),
                    true=tuple(_estimate(run.scores[task], features.validation_labels) for run in repeated),
                    base=_estimate(features.validation_scores, features.validation_labels),
                )
            )
    return points


def _estimate(scores: NDArray[Any], labels: NDArray[Any]) -> Estimate:
    losses, hits = losses_and_hits(scores, labels)
    return Estimate(float(losses.mean()), float(hits.mean()))


def _row(point: Point, names: Sequence[str]) -> dict[str, Any]:
    return {
        "subset": [names[task] for task in point.subset],
        "task": names[point.task],
        "estimated": {"loss": point.estimated.loss, "accuracy": point.estimated.accuracy},
        "true": [{"loss": each.loss, "accuracy": each.accuracy} for each in point.true],
        "base": {"loss": point.base.loss, "accuracy": point.base.accuracy},
    }
