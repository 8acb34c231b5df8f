"""Does the estimate tell the truth, what carries its error, and what does it cost?

    python benchmarks/estimation.py examples/classify10.yaml --output runs/estimation --json estimation.json
    python benchmarks/estimation.py JOB.yaml --output DIR --only truth cost

The figures in docs/validation.md are of one pass after the common one: `--set training.epochs=1 --set training.min_steps=60`.

Everything is kept in run folders under `--output`, and the same command goes on where it stopped. Parts:

- truth: `validate` on the job as it is: `--subsets` subsets of three really fine-tuned, the first `--repeats` of them twice
  with another seed, which gives the ceiling. Goals: accuracy_error 5%, spearman 0.8, loss_error_calibrated 10%, beside it.
- dims: the same truths against the estimate from d = 100, 200, 400 and 800 Rademacher columns (those of smaller d are the first
  of the larger, scaled), at the job's way of choosing λ.
- variations: one factor at a time from the job, `--varied` subsets each: adapter rank 16; the other starting point; 4-bit
  base with `--nf4`. Beside each the job's own figures on the same subsets.
- causes: what the error is made of. `seed`: of a second training instead of the estimate. `λ`: at the best λ for all truths
  together. `curvature`: of the model's linearisation at the weights that training really reached, so without optimiser, λ
  and projection. `scale`: after one factor on the change.
- cost: operations and seconds of gradient pass and search against fine-tuning the sampled subsets, at the job's sizes and epochs
  and at 10 epochs with 500 training and 100 validation examples and with 160 and 80; and against fine-tuning every group
  that the search scored. Seconds are of one training example and one gradient, timed in turns in this process.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from estimation_cost import cost, print_cost
from rich.console import Console

from ray_ensemble import Job
from ray_ensemble.config import JobConfig, load_config
from ray_ensemble.estimator import TaskFeatures
from ray_ensemble.estimator.affinity import job_subsets
from ray_ensemble.estimator.comparison import Point, compare, fit_scale
from ray_ensemble.files import read_json, write_json
from ray_ensemble.models import quiet_libraries
from ray_ensemble.real_runs import RealRun, fine_tune
from ray_ensemble.report import validation_summary
from ray_ensemble.report.tables import text_table
from ray_ensemble.run_folder import RunFolder, open_run
from ray_ensemble.runtime import prepare_environment
from ray_ensemble.stages import Stages
from ray_ensemble.validation import measured_points

PARTS = ("truth", "dims", "variations", "causes", "cost")
DIMS = (100, 200, 400, 800)
MEASURES = (
    ("loss_error", "loss error"),
    ("loss_error_calibrated", "calibrated"),
    ("accuracy_error", "accuracy error"),
    ("spearman", "Spearman"),
    ("pearson", "Pearson"),
)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("job", type=Path, help="a job file")
    parser.add_argument("--output", type=Path, default=Path("runs/estimation"), help="folder of run folders")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts; all need truth")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="as of ray-ensemble")
    parser.add_argument("--subsets", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--varied", type=int, default=4, help="subsets of each variation")
    parser.add_argument("--nf4", action="store_true", help="vary the base's quantization too (slow on a CPU)")
    parser.add_argument("--rounds", type=int, default=5, help="of timing, for the cost")
    return parser.parse_args(argv)


@contextmanager
def opened(folder: Path, config: JobConfig, last: str) -> Iterator[Stages]:
    """The stages of a run folder, whole up to `last`."""
    with open_run(folder, config) as run, ExitStack() as stack:
        stages = Stages(run, stack)
        stages.through(last)
        yield stages


def lend(source: Path, target: Path) -> None:
    """Copy trained adapters of one run folder to another; they are kept under what they depend on."""
    for adapter in sorted((source / "trained").glob("*")):
        if not (target / "trained" / adapter.name).exists():
            shutil.copytree(adapter, target / "trained" / adapter.name)


def truths(stages: Stages, subsets: int, repeats: int) -> list[RealRun]:
    """The runs that `validate` made, from their files."""
    settings = stages.config.estimator
    more = settings.model_copy(update={"subsets": max(settings.subsets, subsets)})
    drawn = job_subsets(stages.features(), more)
    return fine_tune(stages, [(m, s) for k, m in enumerate(drawn[:subsets]) for s in ((0, 1) if k < repeats else (0,))])


def first_columns(features: TaskFeatures, dim: int) -> TaskFeatures:
    """The task under the Rademacher map of `dim` columns, the first of a larger one's, scaled as that map's are."""
    scale = np.float32(np.sqrt(features.dim / dim))
    return replace(
        features,
        train_features=features.train_features[:, :dim] * scale,
        validation_features=features.validation_features[..., :dim] * scale,
    )


def measures(points: Sequence[Point]) -> dict[str, Any]:
    """The errors of DESIGN section 2 without the table."""
    return {key: value for key, value in compare(points).items() if key != "spearman_by_task"}


def dims(args: argparse.Namespace, config: JobConfig, truth: list[RealRun]) -> dict[str, Any]:
    """Errors with fewer columns of one Rademacher map."""
    from ray_ensemble.grouping import job_estimator

    changed, folder = config, args.output / "job"
    if config.gradients.projection != "rademacher" or config.gradients.dim < max(DIMS):
        update = {"dim": max(DIMS), "projection": "rademacher"}
        changed = config.model_copy(update={"gradients": config.gradients.model_copy(update=update)})
        folder = args.output / "dims"
        RunFolder(folder, changed)  # claims it
        lend(args.output / "job", folder)
    with opened(folder, changed, "gradients") as stages:
        features = stages.features()
    found = {}
    for dim in DIMS:
        estimator = job_estimator([first_columns(task, dim) for task in features], changed)
        found[str(dim)] = measures(measured_points(estimator, truth))
    return found


def variations(args: argparse.Namespace, config: JobConfig, job_points: Sequence[Point]) -> dict[str, Any]:
    """Errors of the job with one factor changed, and the job's own on the same subsets."""
    other = "fresh" if config.gradients.start == "meta" else "meta"
    changes: dict[str, dict[str, Any]] = {"rank 16": {"adapter.rank": 16}, f"{other} start": {"gradients.start": other}}
    if args.nf4:
        changes["nf4"] = {"model.quantization": "nf4"}
    kept = sorted({p.subset for p in job_points}, key=[p.subset for p in job_points].index)[: args.varied]
    found: dict[str, Any] = {"as it is": measures([p for p in job_points if p.subset in kept])}
    for name, change in changes.items():
        sets = [*args.set, *(f"{key}={value}" for key, value in change.items())]
        folder = args.output / name.replace(" ", "-")
        print(f"{name}: {folder}", flush=True)
        found[name] = Job.from_yaml(args.job, sets).validate(folder, subsets=args.varied, repeats=0)
        for key in ("table", "spearman_by_task", "steps"):
            del found[name][key]
    return found


def causes(points: Sequence[Point], validation: dict[str, Any]) -> dict[str, Any]:
    """Loss errors that are left when a cause is taken away, or that a cause makes alone."""
    along = [[replace(p, estimated=p.along[place], along=()) for p in points] for place in range(len(points[0].along))]
    best = min(along, key=lambda each: measures(each)["loss_error"])
    arrays = [np.array([getattr(p, side).loss for p in best]) for side in ("estimated", "base")]
    true = np.array([p.true[0].loss for p in best])
    scale = fit_scale(arrays[0], true, arrays[1])
    scaled = arrays[1] + scale * (arrays[0] - arrays[1])
    reached = [row for row in validation["approximation"] if row["direction"] == "training"]
    return {
        "as it is": measures(points)["loss_error"],
        "seed": (validation["seed_to_seed"] or {}).get("loss_error"),
        "λ": measures(best)["loss_error"],
        "λ and scale": float(np.mean(np.abs(scaled - true) / true)),
        "curvature": float(np.mean([abs(row["linear_loss"] - row["loss"]) / row["loss"] for row in reached])),
        "distance of training": float(np.mean([row["distance"] for row in reached])),
        "best λ": measures(best),
    }


def print_measures(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """A line of errors for each of `rows`."""
    table = text_table(title=title, caption="errors relative to the truth; Spearman within datasets")
    table.add_column("")
    for _, name in MEASURES:
        table.add_column(name, justify="right")
    for name, row in rows.items():
        cells = []
        for key, _ in MEASURES:
            value = row.get(key)
            cells.append("–" if value is None else f"{100 * value:.1f}%" if "error" in key else f"{value:.2f}")
        table.add_row(name, *cells)
    Console(width=130, highlight=False).print(table)


def main(argv: Sequence[str]) -> None:
    """Run the parts asked for and print their tables."""
    args = arguments(argv)
    prepare_environment()
    quiet_libraries()
    config = load_config(args.job, list(args.set))
    folder = args.output / "job"
    found: dict[str, Any] = read_json(args.json, "figures") if args.json and args.json.exists() else {}
    last = "search" if "cost" in args.only else "gradients"
    validation = Job.from_yaml(args.job, args.set).validate(folder, subsets=args.subsets, repeats=args.repeats)
    found["truth"] = validation
    Console(width=130, highlight=False).print(validation_summary(validation))
    with opened(folder, config, last) as stages:
        runs = truths(stages, args.subsets, args.repeats)
        estimator = stages.estimator()
        points = measured_points(estimator, runs)
        if "cost" in args.only:
            found["cost"] = cost(stages, runs, args.rounds)
            print_cost(found["cost"])
    if "causes" in args.only:
        found["causes"] = causes(points, validation)
        for name, value in found["causes"].items():
            if isinstance(value, float):
                print(f"{name:22s} {value:.3f}")
    if "dims" in args.only:
        found["dims"] = dims(args, config, runs)
        print_measures("Columns of one Rademacher map", found["dims"])
    if "variations" in args.only:
        found["variations"] = variations(args, config, points)
        print_measures(f"One factor at a time, {args.varied} subsets each", found["variations"])
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    main(sys.argv[1:])
