"""`validate`: really fine-tune sampled subsets of the tasks and hold the estimate against them (DESIGN section 2).

Subsets are the first of those that the affinity samples. Truth is taken on the validation examples that the estimate speaks
of, so that what is measured is the estimate and not the draw of examples; the test split stays untouched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ray_ensemble.errors import InputError
from ray_ensemble.estimator import Estimator, estimate_task, estimates_along
from ray_ensemble.estimator.affinity import job_subsets
from ray_ensemble.estimator.budget import regularization_grid, stack_group
from ray_ensemble.estimator.comparison import Point, compare
from ray_ensemble.estimator.lifting import lifting_shares
from ray_ensemble.files import read_json, sha256_file, sha256_json, write_json
from ray_ensemble.gradients.linearity import Linearity, LinearityProbe, LinearityUnit
from ray_ensemble.pool import PlainActors, map_units, pool_size
from ray_ensemble.progress import Bar
from ray_ensemble.real_runs import RealRun, calibration_subsets, fine_tune, measured, reached
from ray_ensemble.stages import Stages
from ray_ensemble.storage import located
from ray_ensemble.tasks import split_hash

FORMAT = 2
DISTANCES = (0.02, 0.05, 0.1)  # ρ, relative to the norm of the adapter at its start
DIRECTIONS = 2  # subsets whose lifted fit is followed, and whose training is
PROBED = 16  # validation examples of each member


def validate(stages: Stages, subsets: int, repeats: int) -> dict[str, Any]:
    """Fine-tune `subsets` subsets, the first `repeats` of them with a second seed too, and write `validation.json`.

    Raises:
        InputError: more repeats than subsets, or fewer than one subset.
        RunError: a fine-tuning failed; the others are kept.
    """
    check_counts(subsets, repeats)
    estimator = stages.estimator()
    settings = stages.config.estimator
    kept = calibration_subsets(stages, estimator.features)  # λ was chosen by them: they say nothing about the estimate
    more = settings.model_copy(update={"subsets": max(settings.subsets, subsets + len(kept))})
    drawn = [members for members in job_subsets(estimator.features, more) if members not in kept][:subsets]
    if len(drawn) < subsets:
        raise InputError(
            f"--subsets {subsets}: there are only {len(drawn)} subsets of {len(estimator)} tasks; ask for fewer"
        )
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
        "approximation": _approximation(stages, estimator, [run for run in runs if run.seed == 0][:DIRECTIONS]),
    }
    write_json(stages.folder / "validation.json", found)
    return found


def check_counts(subsets: int, repeats: int) -> None:
    """Raise `InputError` for numbers that cannot be, before anything is computed."""
    if subsets < 1:
        raise InputError(f"--subsets {subsets}: at least one subset has to be fine-tuned")
    if not 0 <= repeats <= subsets:
        raise InputError(f"--repeats {repeats}: 0 to {subsets}, the number of subsets")


def measured_points(estimator: Estimator, runs: Sequence[RealRun]) -> list[Point]:
    """Estimates and truths of every (subset, task), on all validation examples of the task."""
    by_subset: dict[tuple[int, ...], list[RealRun]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        by_subset.setdefault(run.members, []).append(run)
    points = []
    grid = regularization_grid(estimator.features)
    for members, repeated in by_subset.items():
        fit, _ = estimator.fit(members)
        along, _ = estimates_along(estimator.features, estimator.training, members, grid)
        truths = [reached(run, estimator.features) for run in repeated]
        for place, task in enumerate(members):
            features = estimator.features[task]
            everything = np.arange(len(features.validation_labels))
            points.append(
                Point(
                    subset=members,
                    task=task,
                    estimated=estimate_task(fit.beta, features, everything),
                    true=tuple(truth[place] for truth in truths),
                    base=measured(features.validation_scores, features.validation_labels),
                    along=tuple(estimates[place] for estimates in along),
                )
            )
    return points


def _approximation(stages: Stages, estimator: Estimator, runs: Sequence[RealRun]) -> list[dict[str, Any]]:
    """How linear the model is along lifted fits and at the distance that training really reached, a row a distance.

    None of them for a base in shards: it takes the whole base in one process.
    """
    if stages.config.gradients.shards > 1:
        print(
            "how linear the model is cannot be measured with gradients.shards > 1; validation.json goes without",
            flush=True,
        )
        return []
    units: dict[str, LinearityUnit] = {}
    for run in runs:
        tasks = [stages.encoded[i] for i in run.members]
        probed = tuple((task.label_ids, task["validation"][:PROBED]) for task in tasks)
        fit, _ = estimator.fit(run.members)
        weights = stack_group(estimator.features, run.members, estimator.training.sampling)[2]
        shares = lifting_shares(estimator.features, run.members, fit.beta, weights)
        counts = [len(each) for each in shares]  # gradients.max_examples may leave out the rest
        train = tuple(
            (task.label_ids, task["train"][:count], each)
            for task, count, each in zip(tasks, counts, shares, strict=True)
        )
        about = {
            "base": stages.base_hashes,
            "data": [split_hash(task, task["validation"][:PROBED]) for task in tasks],
            "how": [stages.config.gradients.batch_tokens, stages.config.gradients.threads],
            "format": FORMAT,
        }
        lifted: dict[str, Any] = {
            "train": [split_hash(task, task["train"][:n]) for task, n in zip(tasks, counts, strict=True)]
        }
        lifted |= {"shares": [np.round(each, 9).tolist() for each in shares], "distances": DISTANCES}
        units[sha256_json(about | lifted)[:16]] = LinearityUnit(probed, train=train, distances=DISTANCES)
        trained = {"adapter": sha256_file(run.folder / "adapter_model.safetensors")}
        units[sha256_json(about | trained)[:16]] = LinearityUnit(
            probed, adapter=located(stages.folder.path, run.folder)
        )
    folder = stages.folder / "linearity"
    missing = {key: unit for key, unit in units.items() if not (folder / f"{key}.json").is_file()}
    if missing:
        stages.need_ray()
        settings = stages.config.gradients
        size = pool_size(settings.replicas, settings.threads, len(missing))
        with Bar("linearity along fits and training", len(missing), "directions") as bar:

            def keep(key: str, found: Linearity) -> None:
                write_json(folder / f"{key}.json", {"squares": found.squares()})
                bar.advance()

            arguments = (stages.spec, settings.threads, settings.batch_tokens)
            map_units(
                PlainActors(LinearityProbe, arguments, settings, size),
                "measure",
                missing,
                size=size,
                on_result=keep,
            )
    squares = {key: read_json(folder / f"{key}.json", "measurement of linearity")["squares"] for key in units}
    rows = [
        _errors([squares[key][place] for key, unit in units.items() if unit.train]) for place in range(len(DISTANCES))
    ]
    rows = [{"direction": "lifted fit", **row} for row in rows]
    rows += [{"direction": "training", **_errors(squares[key])} for key, unit in units.items() if unit.adapter]
    return rows


def _errors(squares: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Both approximation errors (DESIGN section 2) over all examples of some directions at one distance."""
    keys = ("remainder", "value", "change", "loss", "linear_loss", "examples")
    total = {key: sum(each[key] for each in squares) for key in keys}
    whole = [each["model_distance"] for each in squares]
    return {
        "distance": float(np.mean([each["distance"] for each in squares])),
        "model_distance": None if None in whole else float(np.mean(whole)),
        "approximation_error": total["remainder"] / total["value"] if total["value"] > 0 else None,
        "approximation_error_of_change": total["remainder"] / total["change"] if total["change"] > 0 else None,
        "loss": total["loss"] / total["examples"],
        "linear_loss": total["linear_loss"] / total["examples"],
    }


def _row(point: Point, names: Sequence[str]) -> dict[str, Any]:
    return {
        "subset": [names[task] for task in point.subset],
        "task": names[point.task],
        "estimated": {"loss": point.estimated.loss, "accuracy": point.estimated.accuracy},
        "true": [{"loss": each.loss, "accuracy": each.accuracy} for each in point.true],
        "base": {"loss": point.base.loss, "accuracy": point.base.accuracy},
    }
