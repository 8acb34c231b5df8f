"""Does grouping beat one adapter on everything? Every baseline on one budget, with the same seeds, on full test sets.

    python benchmarks/classify10.py examples/classify10.yaml --output runs/benchmarks/classify10 --json classify10.json
    python benchmarks/classify10.py JOB.yaml --output DIR --only ours qlora_all --seeds 1 --minutes 50

It takes hours to days on a small machine, so it is done in pieces: the gradients; for each seed a search; for each arm and
seed its adapters, then its scores. With `--minutes` no unit of work is begun after so many minutes, and the same command goes on
another day. Adapters, scores and results are files under `--output`; what two arms train alike is trained once. Arms that are
complete are told after every call. Exit code 1 means that something is left.

docs/evaluation.md defines arms, budgets, seeds and intervals.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from classify10_arms import ARMS
from classify10_experiment import Experiment, Work
from classify10_table import figures, markdown, tables
from rich.console import Console

from ray_ensemble.config import TrainingConfig, load_config
from ray_ensemble.errors import InputError, RunError
from ray_ensemble.files import jsonl_appender, read_json, write_json, write_text
from ray_ensemble.report.facts import seconds
from ray_ensemble.runtime import cluster_cpus, cluster_gpus, prepare_environment

Kind = Literal["gradients", "search", "hidden_states", "train", "result"]


@dataclass(frozen=True)
class Piece:
    """The smallest thing that is done or not: something that arms need, or the training or the result of an arm with one seed."""

    kind: Kind
    arm: str = ""
    seed: int = 0

    def __str__(self) -> str:
        if self.kind == "search":
            return f"search, seed {self.seed}"
        if not self.arm:
            return self.kind.replace("_", " ")
        return f"{'training' if self.kind == 'train' else 'result'} of {self.arm}, seed {self.seed}"


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("job", help="the job file (YAML)")
    parser.add_argument("--output", "-o", type=Path, required=True, metavar="DIR", help="everything is kept here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="as for ray-ensemble")
    parser.add_argument("--seeds", type=int, default=3, help="trainings and searches of every arm (default: 3)")
    parser.add_argument("--seed", type=int, metavar="R", help="do this one of them alone, counted from 0")
    parser.add_argument("--only", nargs="+", choices=list(ARMS), metavar="ARM", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--groups", type=Path, metavar="FILE", help="groups of your own for the arm by_hand (JSON)")
    parser.add_argument(
        "--records", type=Path, metavar="DIR", help="keep the arms' results here (default: OUTPUT/arms)"
    )
    parser.add_argument("--minutes", type=float, metavar="N", help="begin nothing after so many minutes (0: tell only)")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: 1 at least")
    if args.seed is not None and not 0 <= args.seed < args.seeds:
        parser.error(f"--seed {args.seed}: --seeds {args.seeds} are 0 to {args.seeds - 1}")
    if args.minutes is not None and not args.minutes >= 0:
        parser.error(f"--minutes {args.minutes}: 0 at least")
    return args


def with_needs(wanted: Sequence[str]) -> list[str]:
    """The arms wanted and those that they need, in the order of `ARMS`."""
    chosen = set(wanted)
    while more := {need for arm in chosen for need in ARMS[arm].needs if need in ARMS} - chosen:
        chosen |= more
    return [arm for arm in ARMS if arm in chosen]


def pieces(arms: Sequence[str], seeds: Sequence[int]) -> list[Piece]:
    """Everything that is to be done, in order: what decides groups, so that their adapters can fill lanes that others leave; then
    arm by arm, of an arm all seeds before the next.
    """
    found = dict.fromkeys([Piece("gradients")])
    needs = [need for name in arms for need in ARMS[name].needs]
    if "search" in needs:
        found |= dict.fromkeys(Piece("search", seed=seed) for seed in seeds)
    if "hidden_states" in needs:
        found[Piece("hidden_states")] = None
    for name in arms:
        arm = ARMS[name]
        if arm.adapters is not None:
            found |= dict.fromkeys(Piece("train", name, seed) for seed in seeds)
        found |= dict.fromkeys(Piece("result", name, seed) for seed in seeds)
    return list(found)


def next_unit(left: Sequence[Piece], settings: Callable[[Piece], list[Any] | None], lanes: int) -> list[Piece]:
    """The pieces to do next: the first one, and if it is a training, others that are ready until every lane has an adapter.

    Trainings of a unit have one setting, since those of others would have to wait for them.

    Args:
        left: what is not done, in order; the first is ready.
        settings: of each adapter that the training of a piece has yet to make; None where it is not ready.
        lanes: adapters that are trained side by side.
    """
    first = left[0]
    if first.kind != "train":
        return [first]
    unit, own = [first], settings(first) or []
    count = len(own)
    for piece in left[1:]:
        if count >= lanes:
            break
        more = settings(piece) if piece.kind == "train" else None
        if more and set(more) == set(own):
            unit.append(piece)
            count += len(more)
    return unit


def time_left(left: Mapping[str, float], done: Sequence[Mapping[str, Any]]) -> tuple[float, list[str]]:
    """Seconds that `left` (amounts by kind) should take at the rate of units done, and the kinds without one yet."""
    expected, unknown = 0.0, []
    for kind, amount in left.items():
        units = [unit for unit in done if unit["kind"] == kind]
        if not units:
            unknown.append(kind)
        else:
            expected += amount * sum(unit["seconds"] for unit in units) / sum(unit["amount"] for unit in units)
    return expected, unknown


class Bench:
    """The work of one call."""

    def __init__(self, experiment: Experiment, arms: Sequence[str], seeds: Sequence[int]) -> None:
        self.experiment, self.arms, self.seeds = experiment, arms, seeds
        self._pieces = pieces(arms, seeds)
        self._done: set[Piece] = set()

    def run(self, minutes: float | None) -> bool:
        """Do what is left, or as much as can be begun in so many minutes (one unit at least, unless 0); whether all is done."""
        end = float("inf") if minutes is None else time.monotonic() + 60 * minutes
        log = jsonl_appender(self.experiment.path / "units.jsonl")
        begun = minutes == 0
        while left := self.left():
            if begun and time.monotonic() >= end:
                print(
                    f"time is over: {len(left)} of {len(self._pieces)} pieces left; the same command goes on from here"
                )
                return False
            unit = next_unit(left, self._settings, self._lanes())
            kind, amount = unit[0].kind, sum(self._amount(piece) for piece in unit)
            done = len(self._pieces) - len(left)
            about = f"{amount:,.0f} steps; " if kind == "train" else ""
            print(
                f"{'; '.join(map(str, unit))} ({about}{done} of {len(self._pieces)} pieces done, {self._forecast(left)})",
                flush=True,
            )
            begun, started = True, time.monotonic()
            self._do(unit)
            log(
                {
                    "kind": kind,
                    "unit": list(map(str, unit)),
                    "amount": amount,
                    "seconds": round(time.monotonic() - started, 1),
                }
            )
        return True

    def left(self) -> list[Piece]:
        """What is not done, in order."""
        for piece in self._pieces:  # in order, since what is ready depends on what is done
            if piece not in self._done and self._is_done(piece):
                self._done.add(piece)
        return [piece for piece in self._pieces if piece not in self._done]

    def _is_done(self, piece: Piece) -> bool:
        experiment = self.experiment
        if piece.kind == "gradients":
            return experiment.job.folder.finished("gradients")
        if piece.kind == "search":
            manifest = experiment.path / "partitions" / f"found-{piece.seed}" / "manifests" / "search.json"
            return manifest.exists() or not self._needed("search", [piece.seed])
        if piece.kind == "hidden_states":
            return experiment.states_file.exists() or not self._needed("hidden_states", self.seeds)
        if experiment.record(piece.arm, piece.seed).exists():
            return True
        return piece.kind == "train" and self._settings(piece) == []

    def _needed(self, need: str, seeds: Iterable[int]) -> bool:
        """Whether an arm that needs it lacks a record; records may be from another folder that had it."""
        arms = [arm for arm in self.arms if need in ARMS[arm].needs]
        return any(not self.experiment.record(arm, seed).exists() for arm in arms for seed in seeds)

    def _ready(self, piece: Piece) -> bool:
        """Whether what an arm needs is there."""
        if Piece("gradients") not in self._done:
            return False
        for need in ARMS[piece.arm].needs:
            if need == "hidden_states":
                there = Piece("hidden_states") in self._done
            elif need == "search":
                there = Piece("search", seed=piece.seed) in self._done
            else:
                there = self.experiment.record(need, piece.seed).exists()
            if not there:
                return False
        return True

    def _works(self, piece: Piece) -> list[Work]:
        """Adapters that a training has yet to make."""
        works = ARMS[piece.arm].adapters
        made = works(self.experiment, piece.seed) if works is not None else []
        return [work for work in made if self.experiment.trained(work) is None]

    def _settings(self, piece: Piece) -> list[Any] | None:
        return [work.setting for work in self._works(piece)] if self._ready(piece) else None

    def _amount(self, piece: Piece) -> float:
        """Steps of a training, about as many as a budget where it is not ready and will have some; else 1."""
        if piece.kind != "train":
            return 1.0
        if not self._ready(piece):
            return float(self.experiment.steps) if ARMS[piece.arm].works else 0.0
        return float(sum(work.job.steps for work in self._works(piece)))

    def _forecast(self, left: Sequence[Piece]) -> str:
        amounts: dict[str, float] = {}
        for piece in left:
            amounts[piece.kind] = amounts.get(piece.kind, 0.0) + self._amount(piece)
        expected, unknown = time_left(amounts, list(read_units(self.experiment.path / "units.jsonl")))
        names = ", ".join({"train": "training", "hidden_states": "hidden states"}.get(kind, kind) for kind in unknown)
        but = f", but for {names}, not timed yet" if unknown else ""
        return f"about {seconds(expected)} left{but}" if expected else "time left not known yet"

    def _lanes(self) -> int:
        self.experiment.job.need_ray()
        return lanes(self.experiment.config.training)

    def _do(self, unit: Sequence[Piece]) -> None:
        experiment, (first, *_) = self.experiment, unit
        if first.kind == "gradients":
            experiment.job.through("gradients")
        elif first.kind == "search":
            experiment.place("found", first.seed).through("search")
        elif first.kind == "hidden_states":
            experiment.compute_hidden_states()
        elif first.kind == "train":
            experiment.train([work for piece in unit for work in self._works(piece)])
        else:
            experiment.keep(first.arm, first.seed, ARMS[first.arm].result(experiment, first.seed))
        self._done |= set(unit)


def lanes(training: TrainingConfig) -> int:
    """Adapters that about fill the cluster."""
    if training.concurrency != "auto":
        return training.concurrency * training.pack
    fitting = cluster_gpus() or int(cluster_cpus() // (training.cpus * training.most_workers))
    return max(1, fitting) * training.pack


def read_units(path: Path) -> Iterator[dict[str, Any]]:
    """Units of all calls so far; a line that a kill cut short is left out."""
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def run(argv: Sequence[str]) -> tuple[dict[str, Any], bool]:
    """Do what is left, print, write; the figures, and whether all is done.

    Raises:
        InputError: the job or the folder are not right.
        RunError: a part failed; what is done is kept.
    """
    args = arguments(argv)
    prepare_environment()
    from ray_ensemble.models import quiet_libraries

    quiet_libraries()
    with ExitStack() as stack:
        experiment = Experiment(args.output, load_config(args.job, args.set), stack, args.records)
        experiment.claim_records()
        if experiment.job.folder.finished("gradients"):
            experiment.job.through("gradients")  # again if they are damaged
        if args.groups:
            experiment.keep_by_hand(read_json(args.groups, "file of groups"), args.groups)
        elif "by_hand" in (args.only or ()) and not experiment.hand_file.exists():
            raise InputError("--only by_hand: --groups FILE says which datasets go together")
        absent = {"per_dataset_fresh": not experiment.job.warm, "by_hand": not experiment.hand_file.exists()}
        wanted = [arm for arm in args.only or ARMS if not absent.get(arm)]
        arms = with_needs(wanted)
        seeds = range(args.seeds) if args.seed is None else [args.seed]
        complete = Bench(experiment, arms, seeds).run(args.minutes)
        told = figures(experiment, arms, args.seeds)
    width = None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "220"))
    console = Console(width=width, highlight=False)
    for part in tables(told):
        console.print(part, markup=False)
    if args.json:
        write_json(args.json, told)
    if args.markdown:
        write_text(args.markdown, markdown(told))
    return told, complete


def main(argv: Sequence[str]) -> int:
    """`run`, with the command line's exit codes."""
    try:
        _, complete = run(argv)
    except InputError as error:
        print(f"classify10: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"classify10: {error}; the same command goes on from here", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("classify10: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
