"""How well a run would use many GPUs: measured overheads of every stage here, and a simulation of the pipeline with them.

    python benchmarks/scaling.py --json scaling.json                # measures what the file lacks, then simulates
    python benchmarks/scaling.py --json scaling.json --only model   # simulates with what it has
    python benchmarks/scaling.py --json scaling.json --again pool store

`scaling_measure.py` says what is measured and how, `scaling_model.py` what is simulated, and docs/scaling.md what is assumed: the
speed of the model above all, since there is no GPU here. Efficiency is the GPU seconds that the work needs over GPUs × the
simulated seconds of the stages that use them; beside it stands what it is that keeps the others waiting.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import scaling_measure as measure
import scaling_model as model
from rich.console import Console
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from ray_ensemble.files import read_json, write_json
from ray_ensemble.report.tables import text_table
from ray_ensemble.runtime import ray_session

TASKS, GPUS = (10, 30, 100, 300, 1000), (1, 4, 16, 64, 256)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="figures; parts that are in it stay")
    parser.add_argument("--only", nargs="+", choices=[*measure.PARTS, "model"], default=[*measure.PARTS, "model"])
    parser.add_argument("--again", nargs="*", choices=list(measure.PARTS), default=[], help="measure these anew")
    parser.add_argument("--bases", nargs="+", choices=list(model.BASES), default=list(model.BASES))
    parser.add_argument("--tasks", type=int, nargs="+", default=list(TASKS), help="numbers of datasets")
    parser.add_argument("--gpus", type=int, nargs="+", default=list(GPUS))
    parser.add_argument("--train", type=int, default=model.Job.train, help="training examples a dataset")
    parser.add_argument("--workers", type=int, default=model.Job.workers, help="most workers of one adapter's training")
    return parser.parse_args(argv)


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """The file's figures, with the parts that it lacks measured now; it is written after every part."""
    found: dict[str, Any] = read_json(args.json) if args.json.exists() else {"benchmark": "scaling", "measured": {}}
    parts = found["measured"]
    wanted = [name for name in measure.PARTS if name in args.again or (name in args.only and name not in parts)]
    for need_ray in (False, True):
        todo = [name for name in wanted if (name in measure.NEED_RAY) == need_ray]
        if need_ray and todo:
            with ray_session():
                _measure(todo, found, args.json)
        else:
            _measure(todo, found, args.json)
    return found


def _measure(names: Sequence[str], found: dict[str, Any], file: Path) -> None:
    for name in names:
        print(f"measuring {name}", flush=True)
        load = os.getloadavg()[0]
        with threadpool_limits(limits=1):
            figures = measure.PARTS[name]()
        found["measured"][name] = {**figures, "load_before": load, "cores": os.cpu_count()}
        write_json(file, found)


def tables(found: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Print the simulation's tables; all cells as figures."""
    costs = model.Costs.of(found["measured"])
    cells: dict[str, Any] = {}
    console = Console(width=130, highlight=False)
    for base in args.bases:
        title = f"{base}: efficiency, and what limits it"
        table = text_table(
            title=title, caption=f"{args.train} training examples a dataset; docs/scaling.md has the assumptions"
        )
        for name in ("datasets", *(f"{gpus} GPU{'s' if gpus > 1 else ''}" for gpus in args.gpus)):
            table.add_column(name, justify="right")
        for tasks in args.tasks:
            row = []
            for gpus in args.gpus:
                job = model.Job(tasks, train=args.train, workers=args.workers)
                cell = model.simulate(job, model.BASES[base], gpus, costs)
                cells[f"{base}/{tasks}/{gpus}"] = cell.described()
                row.append(f"{cell.efficiency:.0%} {cell.limit}")
            table.add_row(str(tasks), *row)
        console.print(table)
    return cells


def main(argv: Sequence[str]) -> None:
    """Measure, simulate, print, write."""
    args = arguments(argv)
    found = measured(args)
    if "model" in args.only and set(measure.PARTS) - measure.NOT_IN_THE_MODEL <= found["measured"].keys():
        found["model"] = tables(found, args)
        write_json(args.json, found)


if __name__ == "__main__":
    main(sys.argv[1:])
