"""Fits of many groups against the damped Newton method, scipy's L-BFGS, and the time to read their features.

    python benchmarks/fits.py --json fits.json                     # 10 datasets of 500 examples, d = 400
    python benchmarks/fits.py --threads 1 --clock cpu              # on a machine that does other work

What is measured. Datasets are generated (`estimator.planted`): gradients of mean norm 100 with a decaying spectrum, margins as
a base has them. λ is chosen as a search chooses it, and timed. Then come two lists of groups: the 50 subsets of 3 datasets that
the affinity samples (1,500 rows each), and all datasets together (5,000 rows) 50 times. In rounds, every contender fits its list,
in an order that rotates from round to round:

- ours: `Estimator.groups` on an estimator that knows nothing yet: models of the datasets, fits, examples left out, estimates on
  the validation data. All datasets together are fitted by `Estimator.fit`, which does not cache.
- ours-fit: `fit_margins` alone with the group's model ready; margins of examples left out included.
- ours-cold: the same without a model.
- torch-cpu, and torch-cuda where torch finds a GPU: as ours, by `Estimator(..., device=...)`, which fits all groups of the list
  at once; all datasets together by `BatchedFits`. torch-cpu-fit, torch-cuda-fit: `BatchedFits` with the datasets' models ready.
- newton: what the estimator did before: damped Newton from zero in float64, examples left out.
- lbfgs: scipy's L-BFGS-B in float64 to a gradient of 1e-10; no examples left out. It and newton fit the first `--peer-groups`.
- floor: reading the group's float32 features from memory once for each of ours' Newton steps, at the measured rate of a sum.

Printed are milliseconds a fit (median over rounds, smallest and largest), seconds for 50, and the largest relative gap of the
objective, evaluated in float64 from the definition, to the better of scipy's and newton's. A gap above `--tolerance` ends the run
with an error. Ratios are to newton within a round.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fit_peers as peers
import numpy as np
import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from ray_ensemble.config import TrainingConfig
from ray_ensemble.estimator import Estimator, choose_regularization, fit_margins, sample_subsets
from ray_ensemble.estimator.batched import BatchedFits
from ray_ensemble.estimator.budget import group_regularization, stack_group
from ray_ensemble.estimator.estimator import Group
from ray_ensemble.estimator.models import sampler_shares, sum_models, task_model
from ray_ensemble.estimator.planted import planted_tasks
from ray_ensemble.files import write_json

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
BATCHED = {f"torch-{device}-fit": device for device in DEVICES}  # models ready
BATCHED_WHOLE = {f"torch-{device}": device for device in DEVICES}
OURS = ("ours", "ours-fit", "ours-cold", *BATCHED_WHOLE, *BATCHED)
PEERS = ("newton", "lbfgs")
FITS = 50


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--examples", type=int, default=500, help="training examples a dataset")
    parser.add_argument("--dim", type=int, default=400)
    parser.add_argument("--norm", type=float, default=100.0, help="mean norm of a gradient")
    parser.add_argument("--subset-size", type=int, default=3)
    parser.add_argument("--peer-groups", type=int, default=10, help="groups that newton and lbfgs fit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of BLAS")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: the process's own time")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="of the objective, relative")
    args = parser.parse_args(argv)
    if args.clock == "cpu" and args.threads > 1:
        parser.error("--clock cpu is the time of one thread")
    return args


@dataclass(frozen=True)
class Row:
    """One contender on one list of groups; seconds of every round for the `fits` that it did."""

    groups: str
    name: str
    fits: int
    seconds: list[float]
    milliseconds_per_fit: dict[str, float]
    seconds_for_50: float
    speed_up: dict[str, float] | None
    iterations: float | None
    flops_per_fit: float | None
    largest_gap: float | None


class Bench:
    """The datasets, λ, and what every contender does."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tasks, _ = planted_tasks(args.tasks, 3, train=args.examples, validation=100, dim=args.dim, norm=args.norm)
        self.training = TrainingConfig()
        subsets = sample_subsets(args.tasks, FITS, args.subset_size, 0)
        everything: Group = tuple(range(args.tasks))
        self.lists: dict[str, list[Group]] = {
            f"{FITS} × {args.subset_size} of {args.tasks}": subsets[:FITS],
            f"{FITS} × all {args.tasks}": [everything] * FITS,
        }
        started = CLOCKS[args.clock]()
        self.choice = choose_regularization(self.tasks, self.training, subsets)
        self.choice_seconds = CLOCKS[args.clock]() - started
        self.batched = {name: BatchedFits(self.tasks, self.regularization, device) for name, device in BATCHED.items()}
        for batched in self.batched.values():
            list(batched.fit([(t,) for t in range(args.tasks)]))
        self.models = [task_model(self.tasks, t, self.regularization((t,)))[0] for t in range(args.tasks)]

    def regularization(self, group: Group) -> float:
        """λ of a group."""
        return group_regularization(self.choice.value, self.training, self.tasks, group)

    def problem(self, group: Group) -> peers.Problem:
        """A group's fit as the peers take it."""
        rows, margins, weights, _ = stack_group(self.tasks, group)
        return peers.Problem(
            rows.astype(np.float32, copy=False), margins.astype(np.float64), weights, self.regularization(group)
        )

    def run(self, name: str, groups: Sequence[Group]) -> list[peers.Solved]:
        """Fit all of `groups`."""
        if name in self.batched:
            return _batch(self.batched[name], groups)
        if name == "ours" or name in BATCHED_WHOLE:
            device = BATCHED_WHOLE.get(name)
            estimator = Estimator(self.tasks, self.training, self.choice.value, device=device)
            if len(set(groups)) == len(groups):
                estimator.groups(groups)
                return []
            if device is not None:
                return _batch(BatchedFits(self.tasks, self.regularization, device), groups)
            for group in groups:
                estimator.fit(group)
            return []
        solve: dict[str, Callable[[Group], peers.Solved]] = {
            "ours-fit": lambda group: self._fit(group, model=True),
            "ours-cold": lambda group: self._fit(group, model=False),
            "newton": lambda group: peers.newton(self.problem(group)),
            "lbfgs": lambda group: peers.lbfgs(self.problem(group)),
        }
        return [solve[name](group) for group in groups]

    def _fit(self, group: Group, model: bool) -> peers.Solved:
        rows, margins, weights, starts = stack_group(self.tasks, group)
        summed = sum_models([self.models[t] for t in group], sampler_shares(self.tasks, group)) if model else None
        fit = fit_margins(rows, margins, weights, self.regularization(group), summed, starts=starts)
        if not fit.converged:
            raise SystemExit(f"the fit of {group} did not converge")
        return peers.Solved(fit.beta, fit.objective, fit.iterations)

    def flops(self, group: Group, model: bool) -> int:
        """Operations of our fit of a group."""
        rows, margins, weights, starts = stack_group(self.tasks, group)
        summed = sum_models([self.models[t] for t in group], sampler_shares(self.tasks, group)) if model else None
        return fit_margins(rows, margins, weights, self.regularization(group), summed, starts=starts).flops


def _batch(batched: BatchedFits, groups: Sequence[Group]) -> list[peers.Solved]:
    found = dict(batched.fit(groups))
    if not all(fit.converged for fit in found.values()):
        raise SystemExit("a fit of a batch did not converge")
    fits = [found[place] for place in range(len(groups))]
    return [peers.Solved(fit.beta, fit.objective, fit.iterations) for fit in fits]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def gaps(bench: Bench, groups: Sequence[Group], solved: dict[str, list[peers.Solved]]) -> dict[str, float]:
    """Each contender's largest relative gap of the objective to the better of the peers, over the groups that these fitted."""
    largest = dict.fromkeys(solved, -np.inf)
    for place in range(len(solved["lbfgs"])):
        problem = bench.problem(groups[place])
        reached = {name: peers.objective(problem, found[place].beta) for name, found in solved.items()}
        best = min(reached[name] for name in PEERS)
        for name, value in reached.items():
            largest[name] = max(largest[name], (value - best) / best)
    return {name: float(value) for name, value in largest.items()}


def measure(bench: Bench, label: str, groups: list[Group]) -> list[Row]:
    """All contenders on one list of groups.

    Raises:
        SystemExit: the objective of one of ours is further from the best than the tolerance.
    """
    args = bench.args
    clock = CLOCKS[args.clock]
    names = [*OURS, *PEERS]
    lists = {name: groups if name in OURS else groups[: args.peer_groups] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    solved: dict[str, list[peers.Solved]] = {}
    for r in range(args.rounds):
        shift = r % len(names)
        for name in names[shift:] + names[:shift]:
            started = clock()
            found = bench.run(name, lists[name])
            seconds[name].append(clock() - started)
            if found:
                solved[name] = found
        print(f"{label}: round {r + 1} of {args.rounds} done", file=sys.stderr, flush=True)
    gap = gaps(bench, groups, solved)
    held = [name for name in names if name in gap and name not in PEERS]
    wrong = {name: gap[name] for name in held if not gap[name] <= args.tolerance}
    if wrong:
        raise SystemExit(f"objectives further than {args.tolerance:g} above the best: {wrong}")
    each = {name: [s / len(lists[name]) for s in taken] for name, taken in seconds.items()}
    rows = []
    for name in names:
        faster = spread([n / o for n, o in zip(each["newton"], each[name], strict=True)])
        steps = statistics.mean(found.iterations for found in solved[name]) if name in solved else None
        flops = bench.flops(groups[0], name == "ours-fit") if name in ("ours-fit", "ours-cold") else None
        rows.append(_row(label, name, lists[name], seconds[name], faster, steps, flops, gap.get(name)))
    steps = statistics.mean(found.iterations for found in solved["ours-fit"])
    rate = peers.read_seconds(bench.problem(groups[0]).features.nbytes, clock)
    rows.append(_row(label, "floor", groups, [rate * steps * len(groups)], None, steps, None, None))
    return rows


def _row(
    label: str,
    name: str,
    groups: Sequence[Group],
    seconds: list[float],
    faster: dict[str, float] | None,
    steps: float | None,
    flops: float | None,
    gap: float | None,
) -> Row:
    each = spread([1e3 * s / len(groups) for s in seconds])
    return Row(label, name, len(groups), seconds, each, each["median"] * FITS / 1e3, faster, steps, flops, gap)


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    lines = [["groups", "contender", "ms a fit", "(min–max)", f"s for {FITS}", "× newton", "steps", "MFLOP", "gap"]]
    for row in rows:
        each = row.milliseconds_per_fit
        lines.append(
            [
                row.groups,
                row.name,
                f"{each['median']:.2f}",
                f"({each['min']:.2f}–{each['max']:.2f})",
                f"{row.seconds_for_50:.2f}",
                "" if row.speed_up is None else f"{row.speed_up['median']:.1f}",
                "" if row.iterations is None else f"{row.iterations:.1f}",
                "" if row.flops_per_fit is None else f"{row.flops_per_fit / 1e6:.0f}",
                "" if row.largest_gap is None else f"{row.largest_gap:.1e}",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(w) if i > 1 else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures were taken on."""
    names: list[str] = []
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "clock": args.clock,
        "numpy": np.__version__,
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_before": os.getloadavg()[0],
    }


def main(argv: Sequence[str]) -> None:
    """Measure, print, write."""
    args = arguments(argv)
    about = machine(args)
    torch.set_num_threads(args.threads)
    with threadpool_limits(limits=args.threads):
        bench = Bench(args)
        rows = [row for label, groups in bench.lists.items() for row in measure(bench, label, groups)]
    print(
        f"λ = {bench.choice.value:.4g}, chosen in {bench.choice_seconds:.2f} s at {len(bench.choice.losses)} grid points"
    )
    print(table(rows))
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key not in ("json", "threads", "clock")}
        choice = {"seconds": bench.choice_seconds, "flops": bench.choice.flops, "points": len(bench.choice.losses)}
        figures = {
            "benchmark": "fits",
            "machine": about,
            **settings,
            "regularization": bench.choice.value,
            "choice": choice,
        }
        write_json(args.json, {**figures, "contenders": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main(sys.argv[1:])
