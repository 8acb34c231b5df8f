"""Subsets of tasks that are really fine-tuned, to hold the estimate against: a Ray Train job for each, side by side.

Adapters and scores are kept in the run folder under what they depend on, so that nothing is ever trained or scored twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ray_ensemble.ensemble import ScoreRequest, score_all
from ray_ensemble.estimator import Estimate, TaskFeatures, Truth
from ray_ensemble.estimator.affinity import job_subsets
from ray_ensemble.evaluation.metrics import losses_and_hits
from ray_ensemble.stages import Stages
from ray_ensemble.training import AdapterJob, train_adapters

TruthSplit = Literal["validation", "test"]


@dataclass(frozen=True)
class RealRun:
    """An adapter trained on the tasks `members` (indices) with `seed`, its cost, and its label scores (N, K) of each member."""

    members: tuple[int, ...]
    seed: int
    steps: int
    seconds: float
    tokens: int
    validation_tokens: int
    folder: Path
    scores: dict[int, NDArray[np.float32]]


def fine_tune(
    stages: Stages,
    wanted: Sequence[tuple[tuple[int, ...], int]],
    split: TruthSplit = "validation",
    steps: Sequence[int] | None = None,
) -> list[RealRun]:
    """Train an adapter for every (members, seed) and score it on its members' examples of `split`.

    Args:
        stages: of a run whose plan and tasks are there.
        wanted: tasks (indices) of each adapter, and a seed that is added to the job's own training seed.
        split: what the adapters are scored on.
        steps: the budget of each, in optimiser steps; by default the one that a group of these members gets.

    Raises:
        ValueError: not a budget for each adapter.
        InputError, RunError: as for `train_adapters` and `score_all`.
    """
    if steps is not None and len(steps) != len(wanted):
        raise ValueError(f"{len(steps)} budgets for {len(wanted)} adapters")
    stages.need_ray()
    tasks, settings = stages.encoded, stages.config.training
    jobs = []
    for place, (members, seed) in enumerate(wanted):
        names = tuple(tasks[i].name for i in members)
        own = settings.steps(sum(len(tasks[i]["train"]) for i in members)) if steps is None else steps[place]
        # The budget is part of the name, under which the adapter is looked up once it is trained.
        jobs.append(AdapterJob("+".join(names) + f"#{seed} ({own} steps)", names, own, settings.seed + seed))
    trained = train_adapters(jobs, tasks, stages.config, stages.folder.path, asdict(stages.spec), stages.base_hashes)
    requests = [
        ScoreRequest(trained[job.name].folder, tasks[i], tasks[i][split])
        for job, (members, _) in zip(jobs, wanted, strict=True)
        for i in members
    ]
    scored = iter(
        score_all(
            requests,
            stages.spec,
            stages.config.gradients,
            stages.base_hashes,
            stages.folder.path,
            f"{split} scores of fine-tuned subsets",
        ).scores
    )
    runs = []
    for job, (members, seed) in zip(jobs, wanted, strict=True):
        adapter = trained[job.name]
        scores = {i: next(scored) for i in members}
        runs.append(
            RealRun(
                members,
                seed,
                adapter.steps,
                adapter.seconds,
                adapter.tokens,
                adapter.validation_tokens,
                adapter.folder,
                scores,
            )
        )
    return runs


def reached(run: RealRun, features: Sequence[TaskFeatures]) -> tuple[Estimate, ...]:
    """Loss and accuracy that a run scored on the validation examples of its members, in their order."""
    return tuple(measured(run.scores[task], features[task].validation_labels) for task in run.members)


def measured(scores: NDArray[Any], labels: NDArray[Any]) -> Estimate:
    """Mean loss and accuracy of label scores (N, K) against labels (N,), in the form that estimates have."""
    losses, hits = losses_and_hits(scores, labels)
    return Estimate(float(losses.mean()), float(hits.mean()))


def calibration_subsets(stages: Stages, features: Sequence[TaskFeatures]) -> list[tuple[int, ...]]:
    """The subsets that `estimator.calibrate` fine-tunes: the last of the affinity's, since `validate` takes the first."""
    settings = stages.config.estimator
    return job_subsets(features, settings)[-settings.calibrate :] if settings.calibrate else []


def calibration_truths(stages: Stages, features: Sequence[TaskFeatures]) -> tuple[list[Truth], list[RealRun]]:
    """What the calibration's subsets really reach, and the runs that showed it; see `fine_tune` for errors."""
    subsets = calibration_subsets(stages, features)
    runs = fine_tune(stages, [(members, 0) for members in subsets]) if subsets else []
    return [Truth(run.members, reached(run, features)) for run in runs], runs
