"""The search on generated tasks with planted groups: how it scales, whether it finds the optimum, what Ray Tune adds.

    python benchmarks/search.py --json search.json
    python benchmarks/search.py --only exact --seeds 3

What is measured, on `planted_tasks` of `--train` training and `--validation` validation examples of d = `--dim`:

- scale: the whole search (`run_search`: λ, affinity, trials by Ray Tune, result) of 125, 250 and 500 tasks in ten planted
  groups, a fresh process each, on `--cpus` CPUs. Seconds without Ray's start; peak memory of any one process (resident set, as
  the run's own figure) and bytes a task more, between sizes; adjusted Rand index of the partition against the planted groups.
- exact: for each seed ten tasks in three planted groups; all 1,023 groups fitted, the exact optimum over 2 to 5 groups, and
  whether the best of the default trials (without Ray, the same function) is it. Goal: 9 of 10 seeds.
- tune: 200 trials by Ray Tune on ten tasks: seconds of the whole search, without and with Ray's start. Goal: 60 s.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import adjusted_rand_score
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from ray_ensemble.config import JobConfig, SearchConfig, TrainingConfig
from ray_ensemble.estimator import Estimator, choose_regularization, sample_subsets
from ray_ensemble.estimator.affinity import affinity
from ray_ensemble.estimator.planted import planted_tasks
from ray_ensemble.files import write_json
from ray_ensemble.grouping.cases import run_case, search_cases
from ray_ensemble.grouping.exact import best_optimum, estimated_optima
from ray_ensemble.grouping.partitions import to_labels

PARTS = ("scale", "exact", "tune")
PLANTED = 10  # groups of the scale part


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts")
    parser.add_argument("--sizes", type=int, nargs="+", default=[125, 250, 500], help="numbers of tasks of scale")
    parser.add_argument("--seeds", type=int, default=10, help="of exact")
    parser.add_argument("--trials", type=int, default=32, help="of scale")
    parser.add_argument("--tune-trials", type=int, default=200)
    parser.add_argument("--train", type=int, default=80, help="training examples a task")
    parser.add_argument("--validation", type=int, default=80, help="validation examples a task")
    parser.add_argument("--dim", type=int, default=100)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def job(**search: Any) -> JobConfig:
    """A job with default settings but for the search."""
    data = {"model": {"source": "none"}, "tasks": ["none"], "search": search}
    return JobConfig.model_validate(data)


def searched(tasks: int, groups: int, trials: int, args: argparse.Namespace, counts: list[int]) -> dict[str, Any]:
    """One whole search with Ray: its figures."""
    begun = time.perf_counter()
    import ray

    from ray_ensemble.grouping import run_search

    features, membership = planted_tasks(tasks, groups, train=args.train, validation=args.validation, dim=args.dim)
    ray.init(num_cpus=args.cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = run_search(features, job(groups=counts, trials=trials), Path(folder))
    seconds = time.perf_counter() - started
    ray.shutdown()
    arrays = ("train_features", "train_margins", "validation_scores", "validation_features")
    return {
        "tasks": tasks,
        "trials": found.trials,
        "seconds": seconds,
        "seconds_with_start": time.perf_counter() - begun,
        "fits": found.fits,
        "peak_memory_bytes": found.peak_memory_bytes,
        "feature_bytes": sum(getattr(task, name).nbytes for task in features for name in arrays),
        "m": found.m,
        "adjusted_rand_index": float(adjusted_rand_score(membership, to_labels(found.partition))),
    }


def ask_worker(argv: Sequence[str], what: str) -> dict[str, Any]:
    """Run this program in a fresh process on one search."""
    command = [sys.executable, __file__, *argv, "--worker", what]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603 (ourselves)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def scale(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Searches of growing size."""
    rows = []
    print("tasks  trials     fits   seconds   peak MiB   of which features   groups   adjusted Rand index")
    for size in args.sizes:
        row = ask_worker(argv, str(size))
        rows.append(row)
        print(
            f"{size:5d}  {row['trials']:6d}  {row['fits']:7,d}  {row['seconds']:8.1f}  {row['peak_memory_bytes'] / 2**20:9.0f}"
            f"  {row['feature_bytes'] / 2**20:18.0f}  {row['m']:7d}   {row['adjusted_rand_index']:19.3f}",
            flush=True,
        )
    slopes = [(b["peak_memory_bytes"] - a["peak_memory_bytes"]) / (b["tasks"] - a["tasks"]) for a, b in pairwise(rows)]
    for (a, b), slope in zip(pairwise(args.sizes), slopes, strict=True):
        print(f"from {a} to {b} tasks: {slope / 2**10:,.0f} KiB a task")
    return {"rows": rows, "bytes_a_task": slopes}


def exact(args: argparse.Namespace) -> dict[str, Any]:
    """Whether the trials reach the exact optimum."""
    rows = []
    search, training = SearchConfig(), TrainingConfig()
    print("seed   exact optimum   best of trials   groups   trials at it   seconds (all groups; trials)")
    for seed in range(args.seeds):
        tasks, _ = planted_tasks(10, 3, train=args.train, validation=args.validation, dim=args.dim, seed=seed)
        subsets = sample_subsets(10, 50, 3, seed)
        value = choose_regularization(tasks, training, subsets, seed).value
        estimator = Estimator(tasks, training, value)
        started = time.perf_counter()
        best = best_optimum(estimated_optima(estimator), search.groups)
        fitted = time.perf_counter() - started
        view = affinity(estimator, subsets).symmetric()
        started = time.perf_counter()
        cases = search_cases(search.model_copy(update={"seed": seed}), 10)
        found = [run_case(case, estimator, view, search)["objective"] for case in cases]
        tried = time.perf_counter() - started
        at_it = sum(objective <= best.objective + 1e-9 for objective in found)
        rows.append(
            {
                "seed": seed,
                "optimum": best.objective,
                "best": min(found),
                "m": len(best.partition),
                "reached": at_it > 0,
                "trials_at_optimum": at_it,
                "seconds": [fitted, tried],
            }
        )
        print(
            f"{seed:4d}   {best.objective:13.6f}   {min(found):14.6f}   {len(best.partition):6d}   "
            f"{at_it:4d} of {len(found):3d}   {fitted:12.1f}; {tried:.1f}",
            flush=True,
        )
    reached = sum(row["reached"] for row in rows)
    print(f"optimum reached for {reached} of {len(rows)} seeds")
    return {"reached": reached, "seeds": len(rows), "rows": rows}


def tune(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Many trials on few tasks."""
    row = ask_worker(argv, "tune")
    print(
        f"{row['trials']} Ray Tune trials on {row['tasks']} tasks: {row['seconds']:.1f} s, "
        f"{row['seconds_with_start']:.1f} s with Ray's start; {row['fits']:,} fits"
    )
    return row


def main(argv: Sequence[str]) -> None:
    """Measure, print, write."""
    args = arguments(argv)
    if args.worker == "tune":
        print(json.dumps(searched(10, 3, args.tune_trials, args, [2, 3, 4, 5])))
        return
    if args.worker:
        print(json.dumps(searched(int(args.worker), PLANTED, args.trials, args, [8, 9, 10, 11, 12])))
        return
    figures: dict[str, Any] = {
        "benchmark": "search",
        "machine": {
            "cores": os.cpu_count(),
            "cpus": args.cpus,
            "load_before": os.getloadavg()[0],
            "numpy": np.__version__,
        },
        **{key: getattr(args, key) for key in ("train", "validation", "dim")},
    }
    if "exact" in args.only:
        with threadpool_limits(limits=1):
            figures["exact"] = exact(args)
    if "tune" in args.only:
        figures["tune"] = tune(args, argv)
    if "scale" in args.only:
        figures["scale"] = scale(args, argv)
    if args.json:
        write_json(args.json, figures)


if __name__ == "__main__":
    main(sys.argv[1:])
