"""Group jobs on Ray Train: one after the other, side by side, and packed into one process.

    python benchmarks/group_jobs.py --json group_jobs.json                 # SmolLM2-135M on the quickstart's tasks
    python benchmarks/group_jobs.py --model DIR --job job.yaml --steps 2   # anything else, for a quick look

The job's tasks are dealt to `--groups` groups. In turns, every mode trains all groups for `--steps` steps from the same starting
point, by `train_adapters` as a run does it:

- one by one: `training.concurrency` 1, a job has the whole machine (or one GPU);
- side by side: all jobs at once, each on an equal share of the machine's CPUs (or of one GPU);
- packed: `training.pack` groups, one process and one copy of the base for all.

Training is the time in which steps are made, as the workers log it: of all jobs together one by one, of the longest job where
all run at once. The rest of the whole is start-up: Ray Train's own processes, imports, loading. Where jobs start while others
train, the training has that load in it. Rows a step are the same for every group in every mode.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gradients import machine, spread
from peers import JOB, MODEL
from rich.console import Console

from ray_ensemble.config import JobConfig, load_config
from ray_ensemble.files import write_json
from ray_ensemble.gradients import ReplicaSpec
from ray_ensemble.models import (
    default_device,
    draw_initial_adapter,
    load_base,
    load_tokenizer,
    materialise,
    model_hash,
    quiet_libraries,
)
from ray_ensemble.report.tables import text_table
from ray_ensemble.runtime import cluster_cpus, cluster_gpus, ray_session
from ray_ensemble.stages import encode_all
from ray_ensemble.tasks import EncodedTask, load_tasks
from ray_ensemble.training import AdapterJob, train_adapters

MODES = ("one by one", "side by side", "packed")


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--model", default=MODEL, help="a model source, as in a job file")
    parser.add_argument("--job", type=Path, default=JOB, help="job file whose tasks are trained on")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=MODES, default=list(MODES))
    return parser.parse_args(argv)


def settings(mode: str, groups: int, config: JobConfig) -> JobConfig:
    """The job as this mode trains it."""
    gpus, cpus = cluster_gpus(), cluster_cpus()
    share = groups if mode == "side by side" else 1
    changes: dict[str, Any] = {
        "cpus": (cpus if not gpus else 1.0) / share,
        "gpus": 1.0 / share if gpus else 0.0,
        "threads": max(1, cpus // share) if not gpus else 1,
        "concurrency": groups if mode == "side by side" else 1,
        "pack": groups if mode == "packed" else 1,
    }
    return config.model_copy(update={"training": config.training.model_copy(update=changes)})


def seconds(
    mode: str, groups: Sequence[Sequence[EncodedTask]], steps: int, config: JobConfig, spec: ReplicaSpec
) -> dict[str, float]:
    """Wall seconds of training all groups for so many steps, from an empty run folder, what steps took of them, and memory."""
    jobs = [
        AdapterJob(f"group-{g}", tuple(task.name for task in members), steps, g) for g, members in enumerate(groups)
    ]
    tasks = [task for members in groups for task in members]
    base = {"model": model_hash(materialise(spec.source)), "quantization": spec.quantization, "adapter": "drawn"}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        done = train_adapters(jobs, tasks, settings(mode, len(groups), config), Path(folder), asdict(spec), base)
        wall = time.perf_counter() - started
        logs = [(each.folder / "train.jsonl").read_text().splitlines() for each in done.values()]
    training = (sum if mode == "one by one" else max)(sum(json.loads(row)["seconds"] for row in log) for log in logs)
    memory = max(each.peak_memory_bytes for each in done.values()) * (1 if mode != "side by side" else len(groups))
    return {"whole": wall, "start_up": wall - training, "training": training, "memory_bytes": float(memory)}


def main(argv: Sequence[str]) -> None:
    """Run all modes in turns and print what they took."""
    args = arguments(argv)
    quiet_libraries()
    config = load_config(args.job)
    tasks = encode_all(
        load_tasks(config.tasks, config.limits, Path.cwd()), load_tokenizer(materialise(args.model)), config
    )
    if len(tasks) < args.groups:
        raise SystemExit(f"--groups {args.groups}: the job has {len(tasks)} tasks")
    groups = [tasks[g :: args.groups] for g in range(args.groups)]
    taken: dict[str, list[dict[str, float]]] = {mode: [] for mode in args.only}
    with tempfile.TemporaryDirectory() as folder, ray_session():
        initial = Path(folder) / "init"
        draw_initial_adapter(load_base(materialise(args.model), "none", default_device()), config.adapter, initial)
        quantization = "nf4" if torch.cuda.is_available() else "none"
        spec = ReplicaSpec(args.model, quantization, str(initial), 0)
        for r in range(args.rounds):
            for mode in args.only[r % len(args.only) :] + args.only[: r % len(args.only)]:
                row = seconds(mode, groups, args.steps, config, spec)
                taken[mode].append(row)
                print(f"{mode}: {row['whole']:.1f} s, of these {row['start_up']:.1f} s start-up", flush=True)
    found = {mode: {key: spread([row[key] for row in rows]) for key in rows[0]} for mode, rows in taken.items() if rows}
    table = text_table(
        title=f"{args.groups} group jobs of {args.steps} steps, seconds",
        caption="training: what steps took; medians; memory of all processes that hold a base at once",
    )
    for name in ("", "whole", "start-up", "training", "memory, MiB"):
        table.add_column(name, justify="left" if not name else "right")
    for mode, rows in taken.items():
        cells = [statistics.median(row[key] for row in rows) for key in ("whole", "start_up", "training")]
        memory = statistics.median(row["memory_bytes"] for row in rows) / 2**20
        table.add_row(mode, *(f"{cell:.1f}" for cell in cells), f"{memory:,.0f}")
    Console(width=110, highlight=False).print(table)
    if args.json:
        where = machine(argparse.Namespace(threads=os.cpu_count()), default_device())
        used = {"model": args.model, "job": str(args.job), "groups": args.groups, "steps": args.steps}
        write_json(args.json, {"machine": where, "arguments": used, **found})


if __name__ == "__main__":
    main(sys.argv[1:])
