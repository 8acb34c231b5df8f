"""Our training loop against transformers.Trainer, and several adapters on one base against as many processes.

    python benchmarks/training.py --json training.json                     # SmolLM2-135M on the quickstart's tasks
    python benchmarks/training.py --clock cpu                              # on a machine that does other work
    python benchmarks/training.py --model DIR --job job.yaml --steps 2 --rounds 1    # anything else, for a quick look

The loop. One adapter, the same examples in the same order, the same batch, optimiser, schedule and clipping. In rounds, every
contender trains for `--steps` steps from the same starting point, in an order that rotates; printed are medians, smallest and
largest, in tokens of prompts and label words that are not padding (ours; the same number stands for all).

- ours: `train_adapter`. Rows of a batch are cut by length; logits are taken where label words are scored.
- trainer: `transformers.Trainer` with PEFT as one would use it for this: prompt and right label, loss on the label's tokens,
  batches padded to their longest row. Making the Trainer is not timed.
- trainer-label-loss: the same with our loss (softmax over the label words), so that it computes what ours does. Before anything
  is timed, its losses and ours are compared step by step; if they differ, nothing is printed but the difference.

Extra memory is the peak above the loaded model: on a CPU in a fresh process for each contender (resident set), on a GPU
`max_memory_allocated`.

Together. m adapters (`--together`), each on its own share of the job's tasks, in one process by `train_together`, against m
processes that load the base and train one each, all started at once. Both do the same rows a step in all, in micro-batches of
at most `--batch-tokens`. Throughput counts everything from the start of the processes to their end, imports and loading
included; "in steady state" counts training alone: all tokens over the longest of the processes' training times, or with
`--clock cpu` over the sum of their CPU times. Memory is the peak of a process (resident set, or the GPU's allocated memory,
to which each process adds its own context); the ratios are to one process's with one adapter, and to the sum of m.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gradients import CLOCKS, extra_peak, machine, peak_resident, seconds_of, spread
from peers import JOB, MODEL
from peft import PeftModel
from training_peers import trainer_run

from ray_ensemble.config import AdapterConfig, TrainingConfig, load_config
from ray_ensemble.files import write_json
from ray_ensemble.models import (
    attach_adapters,
    default_device,
    draw_initial_adapter,
    load_base,
    load_tokenizer,
    materialise,
    quiet_libraries,
)
from ray_ensemble.stages import encode_all
from ray_ensemble.tasks import EncodedTask, load_tasks
from ray_ensemble.training import AdapterRun, sample_batch, train_adapter, train_together

CONTENDERS = ("ours", "trainer", "trainer-label-loss")
ADAPTER = "default"


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--model", default=MODEL, help="a model source, as in a job file")
    parser.add_argument("--job", type=Path, default=JOB, help="job file whose tasks are trained on")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8, help="rows a step of each adapter")
    parser.add_argument("--batch-tokens", type=int, default=512, help="padded tokens of a micro-batch at most (ours)")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--together", type=int, default=4, metavar="M", help="adapters on one base; 0 leaves it out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: the processes' own time")
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, default=list(CONTENDERS), help="none: together alone")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory of each contender")
    parser.add_argument("--tolerance", type=float, help="of a step's loss, relative; 1e-3, or 5e-2 on a GPU")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.clock == "cpu" and (args.threads > 1 or default_device().type != "cpu"):
        parser.error("--clock cpu is the time of one thread on a CPU")
    return args


@dataclass(frozen=True)
class Setup:
    """What all contenders share."""

    tasks: list[EncodedTask]
    config: TrainingConfig
    model: Path  # materialised
    initial: Path  # θ₀
    device: torch.device
    pad_id: int = 0


@contextmanager
def prepared(args: argparse.Namespace) -> Iterator[Setup]:
    """Tasks, settings and a starting point; a base is loaded only to draw that."""
    job = load_config(args.job)
    model = materialise(args.model)
    tasks = encode_all(load_tasks(job.tasks, job.limits, Path.cwd()), load_tokenizer(model), job)
    config = TrainingConfig(batch_size=args.batch, batch_tokens=args.batch_tokens, warmup=0.0)
    with tempfile.TemporaryDirectory() as folder:
        initial = Path(folder) / "init"
        base = load_base(model, "none", default_device())
        draw_initial_adapter(base, AdapterConfig(rank=args.rank), initial)
        del base
        yield Setup(tasks, config, model, initial, default_device())


def load_model(setup: Setup, adapters: Sequence[str] = (ADAPTER,)) -> PeftModel:
    """The base with the adapters at the starting point; the first is active and trainable."""
    base = load_base(setup.model, "none", setup.device)
    return attach_adapters(base, dict.fromkeys(adapters, setup.initial), trainable=adapters[0])


# The loop against Trainer


Losses = Callable[[], list[float]]


def contender(name: str, setup: Setup, model: PeftModel, steps: int) -> Callable[[], Losses]:
    """Makes ready (not timed) a run of `steps` steps from the starting point that returns the loss of each."""
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    pool = [(task, example) for task in setup.tasks for example in task["train"]]
    order = [pool[i] for step in range(steps) for i in sample_batch(step, len(pool), setup.config.batch_size, 0)]

    def ours() -> list[float]:
        losses: list[float] = []
        train_adapter(
            model, setup.tasks, setup.config, steps, 0, setup.pad_id, on_step=lambda row: losses.append(row["loss"])
        )
        return losses

    def build() -> Losses:
        with torch.no_grad():
            for n, p in model.named_parameters():
                if n in start:
                    p.copy_(start[n])
        if name == "ours":
            return ours
        return trainer_run(model, order, setup.config, steps, name == "trainer-label-loss")

    return build


def in_turns(builds: dict[str, Callable[[], Losses]], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every contender in every round; each round begins with another one."""
    names = list(builds)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for r in range(args.rounds):
        shift = r % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(seconds_of(builds[name](), default_device(), args.clock))
        print(f"round {r + 1} of {args.rounds} done", file=sys.stderr, flush=True)
    return seconds


def step_tokens(setup: Setup, steps: int) -> int:
    """Tokens that are not padding of the steps of one adapter on all tasks."""
    counted: list[int] = []
    pool = [(task, example) for task in setup.tasks for example in task["train"]]
    for step in range(steps):
        for i in sample_batch(step, len(pool), setup.config.batch_size, 0):
            counted.append(len(pool[i][1].prompt_ids))
    return sum(counted)


def compare_loops(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Check, time and weigh the contenders."""
    with prepared(args) as setup:
        model = load_model(setup)
        tokens = step_tokens(setup, args.steps)
        builds = {name: contender(name, setup, model, args.steps) for name in args.only}
        losses = {name: build()() for name, build in builds.items()}  # this warms up, too
        tolerance = args.tolerance or (5e-2 if setup.device.type == "cuda" else 1e-3)
        if {"ours", "trainer-label-loss"} <= losses.keys():
            pairs = list(zip(losses["ours"], losses["trainer-label-loss"], strict=True))
            error = max(abs(a - b) / abs(b) for a, b in pairs)
            if not error <= tolerance:
                raise SystemExit(f"losses of ours and of Trainer with our loss differ by {error:.2g}: {pairs}")
        seconds = in_turns(builds, args)
    peaks = {}
    if not args.no_memory:
        peaks = {name: int(ask_worker_here(argv, f"loop:{name}")["extra_bytes"]) for name in builds}
    head = f"{'contender':20}{'tokens/s':>10}{'(min–max)':>18}{'× trainer':>11}{'extra MiB':>11}"
    print(head)
    found: dict[str, Any] = {}
    for name, taken in seconds.items():
        speed = spread([tokens / s for s in taken])
        against = seconds.get("trainer")
        ratio = spread([b / a for a, b in zip(taken, against, strict=True)]) if against else None
        found[name] = {
            "seconds": taken, "tokens_per_second": speed, "speed_over_trainer": ratio, "extra_bytes": peaks.get(name),
            "losses": losses[name],
        }  # fmt: skip
        span = f"({speed['min']:.0f}–{speed['max']:.0f})"
        times = f"{ratio['median']:.2f}" if ratio else ""
        mib = f"{peaks[name] / 2**20:.0f}" if name in peaks else ""
        print(f"{name:20}{speed['median']:10.0f}{span:>18}{times:>11}{mib:>11}")
    return {"tokens": tokens, "contenders": found}


def loop_peak(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Extra memory of one contender, in this process."""
    with prepared(args) as setup:
        model = load_model(setup)
        build = contender(name, setup, model, args.steps)
        return {"extra_bytes": extra_peak(build(), setup.device)}


# Several adapters on one base against as many processes


def shares(tasks: Sequence[EncodedTask], m: int) -> list[tuple[EncodedTask, ...]]:
    """The tasks dealt out to m groups; each has one at least."""
    return [tuple(tasks[i::m]) or (tasks[i % len(tasks)],) for i in range(m)]


def together_worker(args: argparse.Namespace, which: str) -> dict[str, Any]:
    """Train all adapters (`all`) or the one of a number, in this process; the starting point is given by its folder."""
    now = CLOCKS[args.clock]
    which, initial = which.split(",", 1)
    began = now()
    job = load_config(args.job)
    path = materialise(args.model)
    tasks = encode_all(load_tasks(job.tasks, job.limits, Path.cwd()), load_tokenizer(path), job)
    config = TrainingConfig(batch_size=args.batch, batch_tokens=args.batch_tokens, warmup=0.0)
    setup = Setup(tasks, config, path, Path(initial), default_device())
    groups = list(enumerate(shares(tasks, args.together)))
    if which == "all":
        names = [f"group-{i}" for i, _ in groups]
        model = load_model(setup, names)
        loaded = now()
        runs = [AdapterRun(names[i], group, args.steps, seed=i) for i, group in groups]
        states = train_together(model, runs, config, 0)
        tokens = sum(state.tokens for state in states.values())
    else:
        model = load_model(setup)
        loaded = now()
        place, group = groups[int(which)]
        tokens = train_adapter(model, group, config, args.steps, place, 0).tokens
    if setup.device.type == "cuda":
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() if setup.device.type == "cuda" else peak_resident()
    return {"tokens": tokens, "loading": loaded - began, "training": now() - loaded, "peak_bytes": peak}


def run_processes(argv: Sequence[str], workers: Sequence[str], clock: str) -> tuple[float, list[dict[str, Any]]]:
    """Start a process for each worker, all at once; seconds until the last has ended, and what each says."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    processes = [
        subprocess.Popen(  # noqa: S603 (ourselves)
            [sys.executable, __file__, *argv, "--worker", worker], stdout=subprocess.PIPE, text=True
        )
        for worker in workers
    ]
    answers = [process.communicate()[0] for process in processes]
    taken = time.perf_counter() - started
    if any(process.returncode for process in processes):
        raise SystemExit("a worker failed; its error is above")
    if clock == "cpu":
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return taken, [json.loads(answer.splitlines()[-1]) for answer in answers]


def compare_together(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """One process with m adapters against m processes, in turns."""
    m = args.together
    rounds: dict[str, list[tuple[float, list[dict[str, Any]]]]] = {"together": [], "apart": []}
    folder = Path(tempfile.mkdtemp())
    try:
        with prepared(args) as setup:
            shutil.copytree(setup.initial, folder / "init")
        workers = {
            "together": [f"together:all,{folder / 'init'}"],
            "apart": [f"together:{i},{folder / 'init'}" for i in range(m)],
        }
        for r in range(args.rounds):
            for name in list(workers)[:: 1 if r % 2 == 0 else -1]:
                rounds[name].append(run_processes(argv, workers[name], args.clock))
            print(f"round {r + 1} of {args.rounds} done", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder)

    def over(values: Sequence[float]) -> float:
        return sum(values) if args.clock == "cpu" else max(values)

    found: dict[str, Any] = {}
    for name, made in rounds.items():
        tokens = sum(answer["tokens"] for answer in made[0][1])
        steady = [over([a["training"] for a in answers]) for _, answers in made]
        found[name] = {
            "tokens": tokens,
            "seconds": [taken for taken, _ in made],
            "tokens_per_second": spread([tokens / taken for taken, _ in made]),
            "steady_tokens_per_second": spread([tokens / s for s in steady]),
            "peak_bytes": [statistics.median(values) for values in zip(*peaks(made), strict=True)],
        }
    one, many = found["together"], found["apart"]
    ratios = {
        "memory_over_one_process": one["peak_bytes"][0] / statistics.mean(many["peak_bytes"]),
        "memory_over_all_processes": one["peak_bytes"][0] / sum(many["peak_bytes"]),
        "throughput": one["tokens_per_second"]["median"] / many["tokens_per_second"]["median"],
        "steady_throughput": one["steady_tokens_per_second"]["median"] / many["steady_tokens_per_second"]["median"],
    }
    print(f"\n{m} adapters, {args.steps} steps of {args.batch} rows each, {one['tokens']} tokens")
    print(f"{'':22}{'tokens/s':>10}{'in steady state':>17}{'peak MiB a process':>20}")
    for name, text in (("together", "one process"), ("apart", f"{m} processes")):
        row = found[name]
        mib = statistics.mean(row["peak_bytes"]) / 2**20
        steady = row["steady_tokens_per_second"]["median"]
        print(f"{text:22}{row['tokens_per_second']['median']:10.0f}{steady:17.0f}{mib:20.0f}")
    print(
        f"one process against {m}: throughput × {ratios['throughput']:.2f}, in steady state × "
        f"{ratios['steady_throughput']:.2f}; memory × {ratios['memory_over_one_process']:.2f} of one, "
        f"× {ratios['memory_over_all_processes']:.2f} of all"
    )
    return {**found, "ratios": ratios, "m": m}


def peaks(made: Sequence[tuple[float, list[dict[str, Any]]]]) -> list[list[float]]:
    """Peak bytes of every process in every round."""
    return [[answer["peak_bytes"] for answer in answers] for _, answers in made]


def ask_worker_here(argv: Sequence[str], worker: str) -> dict[str, Any]:
    """Run this program in a fresh process on one measurement."""
    return run_processes(argv, [worker], "wall")[1][0]


def main(argv: Sequence[str]) -> None:
    """Measure, print, write."""
    args = arguments(argv)
    quiet_libraries()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.worker:
        kind, _, which = args.worker.partition(":")
        print(json.dumps(loop_peak(args, which) if kind == "loop" else together_worker(args, which)))
        return
    figures: dict[str, Any] = {
        "benchmark": "training", "machine": machine(args, default_device()), "model": args.model, "job": str(args.job),
        **{key: getattr(args, key) for key in ("steps", "batch", "batch_tokens", "rank", "rounds", "clock")},
    }  # fmt: skip
    if args.only:
        figures["loop"] = compare_loops(args, argv)
    if args.together:
        figures["together"] = compare_together(args, argv)
    if args.json:
        write_json(args.json, figures)


if __name__ == "__main__":
    main(sys.argv[1:])
