"""The partition that a run's search found against others, all of them really trained with equal budgets.

    python benchmarks/partitions.py examples/classify10.yaml --output runs/classify10 --json partitions.json

Held against the found partition into m groups, each into m groups too:

- exact: the optimum of the run's own objective over all partitions (up to 12 tasks);
- hidden_states: tasks grouped by the cosine of the base's mean hidden states at the last prompt token, their mean taken off;
- gradient_cosine: by the cosine of their mean loss gradients at the start, as projected;
- random-1 …: `--random` random partitions, drawn with `--random-seed`;

and as reference points one adapter on everything (together) and one a task (alone). Groups by similarity come from the clustering
that found the run's partition (`sdp` for `sdp-penalty`), without the local search.

Every partition gets the same optimiser steps: those of all tasks together (epochs · examples / batch size), shared out among
tasks in proportion to their training examples in whole steps by largest remainder; a group gets the sum of its members' shares.
`training.min_steps` is left out, since a floor would give more steps to partitions with small groups. So a run's own adapters may
have had more; `search_at_budget` and `report_at_budget` are estimates that know these steps.

True losses and accuracies are means over tasks on `--split` and over `--seeds` trainings. `minus_found` is the difference to the
found partition on the same examples with its 95% bootstrap interval: examples are redrawn within each task, trainings are not.

The run's search is done first where it is not. Adapters, scores and hidden states are kept in the run folder, so that
the same command goes on after a stop and trains no group twice.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from ray_ensemble.config import SearchConfig
from ray_ensemble.errors import InputError, RunError
from ray_ensemble.estimator import Estimator
from ray_ensemble.estimator.budget import total_examples
from ray_ensemble.estimator.estimator import LOSS_TIE_BREAK, Half
from ray_ensemble.estimator.similarity import centred_cosines, loss_gradient_similarity
from ray_ensemble.evaluation import losses_and_hits, paired_difference
from ray_ensemble.evaluation.hidden_states import mean_hidden_states
from ray_ensemble.files import read_json, write_json
from ray_ensemble.grouping.baselines import Method, group_by_similarity, random_partitions
from ray_ensemble.grouping.exact import EXACT_TASKS, estimated_optima
from ray_ensemble.grouping.objective import objective
from ray_ensemble.grouping.partitions import Group, Partition, canonical
from ray_ensemble.pipeline import Job
from ray_ensemble.real_runs import RealRun, TruthSplit, fine_tune
from ray_ensemble.report.tables import text_table
from ray_ensemble.run_folder import open_run
from ray_ensemble.runtime import prepare_environment
from ray_ensemble.stages import Stages
from ray_ensemble.training import task_steps

HALVES: tuple[Half, ...] = ("search", "report")
Arrays = Sequence[NDArray[Any]]  # an array (examples,) a task


@dataclass(frozen=True)
class Truth:
    """What a partition really reached: per-example losses (nats) and hits, [seed][task] (examples,) each."""

    losses: Sequence[Arrays]
    hits: Sequence[Arrays]

    def means(self, seed: int) -> tuple[float, float]:
        """Mean over tasks of loss and accuracy, of one training."""
        return _mean(self.losses[seed]), _mean(self.hits[seed])

    def over_seeds(self, what: str) -> list[NDArray[np.float64]]:
        """For each task the mean over trainings of its examples' `losses` or `hits`."""
        values: Sequence[Arrays] = getattr(self, what)
        return [np.mean([arrays[task] for arrays in values], axis=0) for task in range(len(values[0]))]


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("job", help="the job file (YAML)")
    parser.add_argument("--output", "-o", required=True, metavar="RUN", help="the run folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="as for ray-ensemble")
    parser.add_argument("--random", type=int, default=3, help="random partitions (default: 3)")
    parser.add_argument("--random-seed", type=int, default=0, help="that these are drawn with (default: 0)")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of every group (default: 1)")
    parser.add_argument(
        "--split", choices=("validation", "test"), default="test", help="where truth is taken (default: test)"
    )
    args = parser.parse_args(argv)
    for name, least in (("random", 0), ("random_seed", 0), ("seeds", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: {least} at least")
    return args


def candidates(stages: Stages, estimator: Estimator, args: argparse.Namespace) -> dict[str, Partition]:
    """All partitions by name, the found one first; the same one may have several names."""
    search = stages.config.search
    found = read_json(stages.folder / "partition.json", "partition")
    numbers = {task.name: number for number, task in enumerate(estimator.features)}
    partition = canonical([numbers[name] for name in group] for group in found["groups"])
    n, m = len(estimator), len(partition)
    method: Method = "spectral" if found["method"] == "spectral" else "sdp"
    named = {"found": partition}
    if n <= EXACT_TASKS:
        print(f"exact optimum of {m} groups: fitting {2**n - 1:,} groups", flush=True)
        named["exact"] = estimated_optima(estimator, search.objective, search.price)[m].partition
    else:
        print(f"no exact optimum: {n} tasks, and it is for {EXACT_TASKS} at most", flush=True)
    stages.need_ray()
    states = mean_hidden_states(
        stages.encoded, stages.spec, stages.config.gradients, stages.base_hashes, stages.folder.path
    )
    named["hidden_states"] = group_by_similarity(centred_cosines(states), m, method, search.seed)
    alike = loss_gradient_similarity(estimator.features)
    named["gradient_cosine"] = group_by_similarity(alike, m, method, search.seed)
    drawn = random_partitions(n, m, args.random, args.random_seed)
    named |= {f"random-{place}": each for place, each in enumerate(drawn, 1)}
    named["together"] = (tuple(range(n)),)
    named["alone"] = tuple((task,) for task in range(n))
    return named


def at_budget(estimator: Estimator) -> Estimator:
    """The same estimate for budgets without the floor `training.min_steps`, with λ_ref at the steps of all tasks together."""
    free = estimator.training.model_copy(update={"min_steps": 0})
    count = total_examples(estimator.features, range(len(estimator)))
    reference = estimator.regularization * estimator.training.steps(count) / free.steps(count)
    return Estimator(estimator.features, free, reference)


def estimates(estimator: Estimator, known: Estimator, partition: Partition, search: SearchConfig) -> dict[str, float]:
    """The objective, price included, on both halves of the validation data; and by `known`, which is `at_budget`."""
    found: dict[str, float] = {}
    for ending, each in (("", estimator), ("_at_budget", known)):
        for half in HALVES:
            found[half + ending] = objective(each, partition, search.objective, search.price, half)
    return found


def truth(partition: Partition, runs: Mapping[tuple[Group, int], RealRun], labels: Arrays, seeds: int) -> Truth:
    """A partition's truth from its groups' adapters; `labels` are each task's, on the split that the runs were scored on."""
    own = {task: group for group in partition for task in group}
    measured = [
        [losses_and_hits(runs[own[task], seed].scores[task], labels[task]) for task in range(len(labels))]
        for seed in range(seeds)
    ]
    return Truth([[a for a, _ in row] for row in measured], [[b for _, b in row] for row in measured])


def figures_of(ours: Truth, found: Truth, m: int, search: SearchConfig, names: Sequence[str]) -> dict[str, Any]:
    """What is reported of a partition's truth: means, spread over seeds, differences to the found one, each task.

    `objective` is what the estimates estimate: mean loss, or 1 − accuracy + 1e-4 · loss, plus the price of m adapters.
    """
    by_seed = [ours.means(seed) for seed in range(len(ours.losses))]
    others = [found.means(seed) for seed in range(len(found.losses))]
    loss, accuracy = (float(np.mean(column)) for column in zip(*by_seed, strict=True))
    value = loss if search.objective == "loss" else 1.0 - accuracy + LOSS_TIE_BREAK * loss
    tasks = zip(names, ours.over_seeds("losses"), ours.over_seeds("hits"), strict=True)
    return {
        "loss": loss,
        "accuracy": accuracy,
        "objective": value + search.price * m,
        "by_seed": [{"loss": a, "accuracy": b} for a, b in by_seed],
        "loss_spread": _spread([a for a, _ in by_seed]),
        "accuracy_spread": _spread([b for _, b in by_seed]),
        "minus_found": {
            "loss": paired_difference(ours.over_seeds("losses"), found.over_seeds("losses")),
            "accuracy": paired_difference(ours.over_seeds("hits"), found.over_seeds("hits")),
            "loss_by_seed": [a - b for (a, _), (b, _) in zip(by_seed, others, strict=True)],
        },
        "tasks": {name: {"loss": float(a.mean()), "accuracy": float(b.mean())} for name, a, b in tasks},
    }


def rank_correlations(rows: Mapping[str, Mapping[str, Any]], m: int | None = None) -> dict[str, Any]:
    """Spearman correlation of each kind of estimate with the true objective, each partition once; of m groups, or of all.

    None where there are fewer than three partitions, or one side is constant.
    """
    distinct = [row for row in rows.values() if row["same_as"] is None and m in (None, row["m"])]
    found: dict[str, Any] = {"partitions": len(distinct)}
    true = [row["true"]["objective"] for row in distinct]
    for kind in (*HALVES, *(f"{half}_at_budget" for half in HALVES)):
        estimated = [row["estimated"][kind] for row in distinct]
        told = len(distinct) > 2 and len(set(estimated)) > 1 and len(set(true)) > 1
        found[kind] = float(spearmanr(estimated, true).statistic) if told else None
    return found


def compared(stages: Stages, args: argparse.Namespace) -> dict[str, Any]:
    """Estimate, train and measure all partitions: the figures.

    Raises:
        InputError: the budget leaves a task without a step.
        RunError: a training failed; the others are kept.
    """
    search, training, split = stages.config.search, stages.config.training, args.split
    names = [task.name for task in stages.encoded]
    steps = task_steps([len(task["train"]) for task in stages.encoded], training)
    with threadpool_limits(limits=1):  # the bits of the search
        estimator = stages.estimator()
        named = candidates(stages, estimator, args)
        known = at_budget(estimator)
        estimated = {name: estimates(estimator, known, partition, search) for name, partition in named.items()}
    runs, labels = trained(stages, named, steps, args.seeds, split)
    first = {partition: name for name, partition in reversed(named.items())}
    truths = {name: truth(partition, runs, labels, args.seeds) for name, partition in named.items()}
    m = len(named["found"])
    rows: dict[str, dict[str, Any]] = {}
    for name, partition in named.items():
        budgets = [sum(steps[task] for task in group) for group in partition]
        rows[name] = {
            "groups": [[names[task] for task in group] for group in partition],
            "m": len(partition),
            "same_as": None if first[partition] == name else first[partition],
            "steps": sum(budgets),
            "group_steps": budgets,
            "estimated": estimated[name],
            "true": figures_of(truths[name], truths["found"], len(partition), search, names),
        }
    return {
        "benchmark": "partitions",
        "machine": {"cores": os.cpu_count(), "device": read_json(stages.folder / "plan.json")["model"]["device"]},
        "tasks": names,
        "split": split,
        "examples": [len(each) for each in labels],
        "seeds": args.seeds,
        "metric": search.objective,
        "price": search.price,
        "task_steps": list(steps),
        "adapters": len(runs),
        "training_seconds": round(sum(run.seconds for run in runs.values()), 1),
        "rank_correlation": {f"m = {m}": rank_correlations(rows, m), "all": rank_correlations(rows)},
        "partitions": rows,
    }


def trained(
    stages: Stages, named: Mapping[str, Partition], steps: Sequence[int], seeds: int, split: TruthSplit
) -> tuple[dict[tuple[Group, int], RealRun], Arrays]:
    """Every distinct group of the partitions trained with every seed, and each task's labels (examples,) on the split."""
    groups = dict.fromkeys(group for partition in named.values() for group in partition)
    wanted = [(group, seed) for group in groups for seed in range(seeds)]
    budgets = [sum(steps[task] for task in group) for group, _ in wanted]
    floor = stages.config.training.min_steps
    short = sum(sum(steps[task] for task in group) < floor for group in groups)
    if short:
        print(f"equal budgets: {short} of {len(groups)} groups get fewer steps than training.min_steps ({floor})")
    print(f"{len(wanted)} adapters of {len(groups)} groups, {sum(budgets):,} steps in all", flush=True)
    runs = fine_tune(stages, wanted, split, budgets)
    labels = [np.array([example.label for example in task[split]]) for task in stages.encoded]
    return dict(zip(wanted, runs, strict=True)), labels


def tables(figures: Mapping[str, Any]) -> list[Table | str]:
    """The figures for a terminal."""
    rows, seeds = figures["partitions"], figures["seeds"]
    kind = "loss" if figures["metric"] == "loss" else "1 − accuracy"
    table = text_table(
        title=f"Partitions of {len(figures['tasks'])} tasks, really trained: means over tasks on {figures['split']}",
        caption=f"estimated: {kind} on either half of the validation data; − found: on the same examples, with its 95% "
        "interval over examples; = : the same partition"
        + (f"; ±: standard deviation over {seeds} trainings" if seeds > 1 else ""),
    )
    table.add_column("partition")
    for column in ("m", "steps", "est. search", "est. report", "loss", "− found", "accuracy", "− found, points"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        true, minus = row["true"], row["true"]["minus_found"]
        alike = row["same_as"] == "found" or name == "found"
        table.add_row(
            f"{name} = {row['same_as']}" if row["same_as"] else name,
            str(row["m"]),
            f"{row['steps']:,}",
            *(f"{row['estimated'][half]:.4f}" for half in HALVES),
            f"{true['loss']:.4f}" + _about(true["loss_spread"], 1, ".4f"),
            "" if alike else _difference(minus["loss"], 1, "+.4f"),
            f"{100 * true['accuracy']:.1f}%" + _about(true["accuracy_spread"], 100, ".1f"),
            "" if alike else _difference(minus["accuracy"], 100, "+.1f"),
        )
    parts: list[Table | str] = [table, ""]
    for name, row in rows.items():
        if row["same_as"] is None and name not in ("together", "alone"):
            pairs = zip(row["groups"], row["group_steps"], strict=True)
            parts.append(f"{name}: " + " | ".join(f"{', '.join(group)} ({steps})" for group, steps in pairs))
    parts.append("(in brackets: optimiser steps of the group)")
    for which, found in figures["rank_correlation"].items():
        told = ", ".join(f"{key.replace('_', ' ')} {_number(found[key])}" for key in found if key != "partitions")
        parts.append(f"Spearman, estimated and true, {found['partitions']} partitions ({which}): {told}")
    return parts


def _mean(arrays: Arrays) -> float:
    return float(np.mean([array.mean() for array in arrays]))


def _spread(values: Sequence[float]) -> float | None:
    """Standard deviation (ddof 1); None of one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _about(spread: float | None, unit: float, form: str) -> str:
    return "" if spread is None else f" ± {unit * spread:{form}}"


def _difference(paired: Mapping[str, Any], unit: float, form: str) -> str:
    low, high = (unit * bound for bound in paired["interval"])
    return f"{unit * paired['difference']:{form}} [{low:{form}}, {high:{form}}]"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def run(argv: Sequence[str]) -> dict[str, Any]:
    """Measure, print, write; returns the figures. Errors as for `Job.through` and `compared`."""
    args = arguments(argv)
    prepare_environment()
    from ray_ensemble.models import quiet_libraries

    quiet_libraries()
    with open_run(args.output, Job.from_yaml(args.job, args.set).config) as folder, ExitStack() as stack:
        stages = Stages(folder, stack)
        stages.through("search")
        figures = compared(stages, args)
    width = None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "160"))
    console = Console(width=width, highlight=False)
    for part in tables(figures):
        console.print(part, markup=False)
    if args.json:
        write_json(args.json, figures)
    return figures


def main(argv: Sequence[str]) -> int:
    """`run`, with the command line's exit codes."""
    try:
        run(argv)
    except InputError as error:
        print(f"partitions: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"partitions: {error}; the same command goes on from here", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("partitions: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
