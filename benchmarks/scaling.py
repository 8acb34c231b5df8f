"""How well a run would use many GPUs: measured overheads of every stage here, and a simulation of the pipeline with them.

    python benchmarks/scaling.py --json scaling.json                # measures what the file lacks, then simulates
    python benchmarks/scaling.py --json scaling.json --only model   # simulates with what it has
    python benchmarks/scaling.py --json scaling.json --again pool store
    python benchmarks/scaling.py --without-overheads                # what follows from the work alone

`scaling_measure.py` says what is measured and how, `scaling_model.py` what is simulated, and docs/scaling.md what is assumed: the
speed of the model above all, since there is no GPU here. Efficiency is the GPU seconds that the work needs over GPUs × the
simulated seconds of the whole run; beside it stand the stage that loses most GPU seconds and what loses them there. Each table is
printed for the package as it was before its first bottleneck was mended, and as it is.
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
# training.workers (0 is auto), and whether every score's request hashes its adapter.
WAYS = {"before: one worker an adapter, hashes for each score": (1, True), "now: training.workers auto": (0, False)}


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--json", type=Path, default=Path("scaling.json"), metavar="FILE", help="figures; parts that are in it stay"
    )
    parser.add_argument("--only", nargs="+", choices=[*measure.PARTS, "model"], default=[*measure.PARTS, "model"])
    parser.add_argument("--again", nargs="*", choices=list(measure.PARTS), default=[], help="measure these anew")
    parser.add_argument("--bases", nargs="+", choices=list(model.BASES), default=list(model.BASES))
    parser.add_argument("--tasks", type=int, nargs="+", default=list(TASKS), help="numbers of datasets")
    parser.add_argument("--gpus", type=int, nargs="+", default=list(GPUS))
    parser.add_argument("--train", type=int, default=model.Job.train, help="training examples a dataset")
    parser.add_argument(
        "--without-overheads", action="store_true", help="simulate without what is measured; measures nothing"
    )
    parser.add_argument("--markdown", action="store_true", help="tables as Markdown")
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
    cells: dict[str, Any] = {}
    for base in args.bases:
        for way, (workers, before) in WAYS.items():
            costs = model.Costs.of(found["measured"], before) if found else model.NO_OVERHEAD
            rows: list[list[str]] = []
            for tasks in args.tasks:
                job = model.Job(tasks, train=args.train, workers=workers)
                row = [model.simulate(job, model.BASES[base], gpus, costs) for gpus in args.gpus]
                cells |= {
                    f"{way}/{base}/{tasks}/{gpus}": cell.described() for gpus, cell in zip(args.gpus, row, strict=True)
                }
                rows.append([str(tasks), *(f"{cell.efficiency:.0%} {cell.limit}" for cell in row)])
            columns = ["datasets", *(f"{gpus} GPU{'s' if gpus > 1 else ''}" for gpus in args.gpus)]
            _print(f"{base}, {way}", columns, rows, args.markdown)
    return cells


def _print(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> None:
    if markdown:
        print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
        print("\n".join(f"| {' | '.join(row)} |" for row in rows))
        return
    table = text_table(title=title, caption="efficiency, and what loses most; docs/scaling.md has the assumptions")
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=150, highlight=False).print(table)


def main(argv: Sequence[str]) -> None:
    """Measure, simulate, print, write."""
    args = arguments(argv)
    if args.without_overheads:
        tables({}, args)
        return
    found = measured(args)
    if "model" in args.only and set(measure.PARTS) - measure.NOT_IN_THE_MODEL <= found["measured"].keys():
        found["model"] = tables(found, args)
        write_json(args.json, found)


if __name__ == "__main__":
    main(sys.argv[1:])
