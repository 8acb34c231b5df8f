"""What a prediction costs with M adapters: in one batch on one base, in M passes one after the other, and merged into one.

    python benchmarks/inference.py runs/demo --json inference.json --generate 32

Takes a finished run's base, one of its datasets and M of its adapters (the groups', the baseline's, the boosters'), with weight
1/M each. Rows are test examples. Every variant has a process of its own with its own copy of the base; in rounds, each predicts
all rows once, in an order that rotates. Ratios are taken within a round; medians are printed, the range is in the file.

- base: the bare base's forward passes over the same rows in the same batches, without any adapter, tokenizer or softmax over
  adapters: the floor of one pass.
- one: `Predictor` with one adapter of the M. All ratios are to it.
- mixed: `Predictor` with all of them, rows × adapters in one batch. Asked for: at most 1.1 · M times `one`.
- sequential: PEFT's adapters on one base, a pass over all rows for each, as the papers' authors do.
- merged: `Predictor` with the merged adapter. Asked for: at most 1.1 times `one`.

Predictions of mixed and sequential are compared before anything is timed. `--generate N` then times one, mixed and merged in
writing N tokens after `--prompts` prompts, ends of texts ignored. Asked for on a GPU: mixed at most 1.5 times `one`, since at a
small batch a step reads the base once whatever the number of rows.

FLOPs are 2 · N · tokens a pass and the adapters' own (`evaluation.flops`). Memory is the peak of the process: its resident set,
or what it had allocated on the GPU. On a machine that does other work, `--clock cpu` takes the process's own time on one thread.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gradients import CLOCKS, machine, peak_resident, seconds_of, spread
from rich.console import Console
from scipy.special import softmax

from ray_ensemble.config import JobConfig, load_config
from ray_ensemble.ensemble import Predictor, ScoreRequest, combine, ensemble_parts, merge_adapters
from ray_ensemble.ensemble.generation import Prompt, generate
from ray_ensemble.ensemble.scoring import ScoringReplica
from ray_ensemble.errors import InputError
from ray_ensemble.evaluation.flops import ModelSize, forward_flops
from ray_ensemble.files import read_json, write_json
from ray_ensemble.gradients import ReplicaSpec
from ray_ensemble.models import (
    LabelTree,
    MixedAdapters,
    default_device,
    label_scores,
    length_sorted_batches,
    load_base,
    load_tokenizer,
    make_batch,
    materialise,
    quiet_libraries,
)
from ray_ensemble.report.tables import text_table
from ray_ensemble.runtime import peak_memory_bytes
from ray_ensemble.tasks import EncodedTask, Task, encode_task, load_tasks

PREDICTING = ("base", "one", "mixed", "sequential", "merged")
GENERATING = ("one", "mixed", "merged")
Work = Callable[[], Any]


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="a finished run's folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--task", help="the dataset whose rows are predicted (default: the first)")
    parser.add_argument("--adapters", type=int, default=4, help="M")
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--generate", type=int, default=0, metavar="N", help="also time writing N tokens")
    parser.add_argument("--prompts", type=int, default=4, help="prompts that are continued at once")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: the process's own time")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.clock == "cpu" and (args.threads > 1 or default_device().type != "cpu"):
        parser.error("--clock cpu is the time of one thread on a CPU")
    return args


# The run folders that are timed


def prepare(run: Path, task: str, adapters: int, work: Path) -> None:
    """Make the folders `one` and `all` in `work`: the run's base and data with one and with M of its adapters, weight 1/M each.

    Raises:
        InputError: the run has fewer adapters.
    """
    names = read_json(run / "ensemble.json", "ensemble")["adapters"]
    pool = [run / "adapters" / name for name in names]
    pool += [path for kind in ("baselines", "boosters") for path in sorted((run / kind).glob("*"))]
    if len(pool) < adapters:
        raise InputError(f"--adapters {adapters}: {run} has {len(pool)}, the baseline and boosters included")
    for name, count in (("one", 1), ("all", adapters)):
        folder = work / name
        folder.mkdir()
        for file in ("config.yaml", "plan.json", "tasks.json"):
            shutil.copy(run / file, folder / file)
        for place, source in enumerate(pool[:count]):
            shutil.copytree(source, folder / "adapters" / f"adapter-{place}")
        listed = [f"adapter-{place}" for place in range(count)]
        write_json(
            folder / "ensemble.json", {"adapters": listed, "weights": {task: [1 / count] * count}, "boosting": {}}
        )
        write_json(folder / "manifests" / "ensemble.json", {"stage": "ensemble", "files": {}})
        folders = [folder / "adapters" / each for each in listed]
        merge_adapters(folders, [1 / count] * count, folder / "merged" / task)


# What a worker's process does


class Bench:
    """A prepared folder's dataset, in this process."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.config: JobConfig = load_config(folder / "config.yaml")
        self.model: dict[str, Any] = read_json(folder / "plan.json")["model"]
        self.task: Task = next(
            found for found in load_tasks(self.config.tasks, self.config.limits, Path.cwd()) if found.name == args.task
        )
        self.rows = [(args.task, dict(example.fields)) for example in self.task["test"][: args.examples]]

    def encoded(self) -> EncodedTask:
        """The dataset as token ids, the rows that are predicted as its test split."""
        tokenizer = load_tokenizer(materialise(self.config.model.source))
        rows = self.task["test"][: self.args.examples]
        task = Task(self.task.name, self.task.prompt, self.task.labels, {"train": (), "validation": (), "test": rows})
        return encode_task(task, tokenizer, self.config.limits.max_tokens, self.config.model.chat)

    def parts(self, merged: bool) -> dict[str | None, float]:
        """What is asked about a prompt, as `Predictor` has it."""
        if merged:
            return {f"merged/{self.task.name}": 1.0}
        return ensemble_parts(read_json(self.folder / "ensemble.json"), self.task.name, warm=False)

    def predictor(self, merged: bool) -> Work:
        """Probabilities (N, K) of the rows by `Predictor`."""
        predictor = Predictor(self.folder, [self.task.name], merged)
        return lambda: [list(found["probabilities"].values()) for found in predictor.predict(self.rows)]

    def sequential(self) -> Work:
        """Probabilities (N, K) of the rows by a pass for each adapter."""
        folders = sorted((self.folder / "adapters").iterdir())
        spec = ReplicaSpec(self.config.model.source, self.model["quantization"], str(folders[0]), self.model["pad_id"])
        replica = ScoringReplica(spec, self.args.threads, self.config.gradients.batch_tokens)

        def work() -> Any:
            encoded = self.encoded()
            scores = [replica.score(ScoreRequest(path, encoded, encoded["test"]))["scores"] for path in folders]
            return softmax(combine(np.stack(scores), np.full(len(scores), 1 / len(scores))), axis=1).tolist()

        return work

    def base(self) -> Work:
        """The base alone over the rows."""
        model, encoded = self.bare(), self.encoded()
        tree, examples = LabelTree.of(encoded.label_ids), encoded["test"]
        lengths = [len(example.prompt_ids) + len(tree.tokens) for example in examples]
        batches = [
            make_batch(
                [examples[i] for i in places], [tree] * len(places), len(encoded.labels), self.model["pad_id"], model.device
            )
            for places in length_sorted_batches(lengths, self.config.gradients.batch_tokens)
        ]  # fmt: skip

        @torch.inference_mode()
        def work() -> None:
            for batch in batches:
                label_scores(model, batch)

        return work

    def generator(self, merged: bool) -> Work:
        """Tokens written after the first rows' prompts; no text ends early."""
        model, parts = self.bare(), self.parts(merged)
        adapters = MixedAdapters(model, {part: self.folder / part for part in parts if part is not None})
        examples = self.encoded()["test"][: self.args.prompts]
        prompts = [Prompt(example.prompt_ids, parts) for example in examples]
        return lambda: len(generate(model, adapters, prompts, self.args.generate, (), self.model["pad_id"]))

    def bare(self) -> Any:
        """The base without adapters."""
        return load_base(materialise(self.config.model.source), self.model["quantization"], default_device())


def serve(args: argparse.Namespace) -> None:
    """Load one variant; answer each line of standard input: `check` with the result, `time` with seconds, `memory` with bytes."""
    quiet_libraries()
    torch.set_num_threads(args.threads)
    mode, _, variant = args.worker.partition("-")
    bench = Bench(args, args.work / ("one" if variant == "one" else "all"))
    merged = variant == "merged"
    if mode == "generate":
        work = bench.generator(merged)
    elif variant in ("base", "sequential"):
        work = getattr(bench, variant)()
    else:
        work = bench.predictor(merged)
    answers: dict[str, Work] = {
        "check": work,
        "time": lambda: seconds_of(work, default_device(), args.clock),
        "memory": lambda: peak_memory_bytes() if default_device().type == "cuda" else peak_resident(),
    }
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


# What the parent does


class Worker:
    """A variant's process."""

    def __init__(self, name: str, argv: Sequence[str], work: Path) -> None:
        command = [sys.executable, __file__, *argv, "--worker", name, "--work", str(work)]
        self._name = name
        self._process = subprocess.Popen(  # noqa: S603 (ourselves)
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, what: str) -> Any:
        """Its answer to one line."""
        if self._process.stdin is None or self._process.stdout is None:
            raise ValueError("a worker without pipes")
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(("[", "{", "null")) or line[:1].isdigit():
                return json.loads(line)
        raise SystemExit(f"the process of {self._name} ended: see its error above")

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


def measure(mode: str, variants: Sequence[str], args: argparse.Namespace, argv: Sequence[str], work: Path) -> Any:
    """Seconds of every variant in every round, and peaks of memory."""
    workers = {name: Worker(f"{mode}-{name}", argv, work) for name in variants}
    try:
        found = {name: worker.ask("check") for name, worker in workers.items()}
        if mode == "predict":
            difference = float(np.abs(np.array(found["mixed"]) - np.array(found["sequential"])).max())
            limit = 1e-4 if default_device().type == "cpu" else 5e-2  # bf16
            if difference > limit:
                raise SystemExit(f"mixed and sequential differ by {difference:.1e} in probability: nothing is timed")
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for r in range(args.rounds):
            shift = r % len(variants)
            for name in [*variants[shift:], *variants[:shift]]:
                seconds[name].append(workers[name].ask("time"))
            print(f"{mode}: round {r + 1} of {args.rounds} done", file=sys.stderr, flush=True)
        return seconds, {name: workers[name].ask("memory") for name in variants}
    finally:
        for worker in workers.values():
            worker.close()


def figures(seconds: dict[str, list[float]], memory: dict[str, int], work: dict[str, float], units: float) -> Any:
    """For each variant: seconds, rows (or tokens) a second, ratio to `one`, FLOPs, memory."""
    return {
        name: {
            "seconds": spread(times),
            "per_second": units / statistics.median(times),
            "ratio_to_one": spread([a / b for a, b in zip(times, seconds["one"], strict=True)]),
            "flops": work[name],
            "peak_memory_bytes": memory[name],
        }
        for name, times in seconds.items()
    }


def show(title: str, unit: str, found: dict[str, Any], limits: dict[str, float]) -> None:
    """Print a table."""
    table = text_table(title=title, caption="medians over rounds; ratio to one adapter within a round")
    for name in ("", f"{unit}/s", "× one", "asked for", "GFLOP", "GFLOP/s", "peak MiB"):
        table.add_column(name, justify="left" if not name else "right")
    for name, row in found.items():
        table.add_row(
            name,
            f"{row['per_second']:.2f}",
            f"{row['ratio_to_one']['median']:.2f}",
            f"≤ {limits[name]:.1f}" if name in limits else "",
            f"{row['flops'] / 1e9:,.1f}",
            f"{row['flops'] / 1e9 / row['seconds']['median']:,.1f}",
            f"{row['peak_memory_bytes'] / 2**20:,.0f}",
        )
    Console(width=110, highlight=False).print(table)


def main(argv: Sequence[str]) -> None:
    """Measure and print."""
    args = arguments(argv)
    if args.worker:
        serve(args)
        return
    if args.task is None:
        args.task = read_json(args.run / "tasks.json", "list of tasks")["tasks"][0]["name"]
        argv = [*argv, "--task", args.task]
    m = args.adapters
    about = machine(args, default_device())
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        try:
            prepare(args.run.resolve(), args.task, m, work)
        except InputError as error:
            raise SystemExit(f"inference.py: {error}") from None
        bench = Bench(args, work / "all")
        plan = read_json(work / "all" / "plan.json")
        size = ModelSize(plan["model"]["backbone_parameters"], sum(plan["adapter"]["parameters"].values()))
        encoded = bench.encoded()
        nodes = len(LabelTree.of(encoded.label_ids).tokens)
        lengths = [len(example.prompt_ids) + nodes for example in encoded["test"]]
        passes = {"base": (1, 0), "one": (1, 1), "mixed": (m, 1), "sequential": (m, 1), "merged": (1, m)}

        def flops(name: str, tokens: int) -> float:
            count, adapters = passes[name]
            return float(count * forward_flops(size, tokens, adapters))

        seconds, memory = measure("predict", PREDICTING, args, argv, work)
        counted = {name: flops(name, sum(lengths)) for name in PREDICTING}
        result: dict[str, Any] = {"predict": figures(seconds, memory, counted, len(lengths))}
        show(
            f"{len(lengths)} rows of {args.task}, {m} adapters", "rows", result["predict"],
            {"mixed": 1.1 * m, "merged": 1.1},
        )  # fmt: skip
        if args.generate:
            seconds, memory = measure("generate", GENERATING, args, argv, work)
            count = min(args.prompts, len(lengths))
            tokens = sum(lengths[:count]) - nodes * count + count * (args.generate - 1)
            counted = {name: flops(name, tokens) for name in GENERATING}
            result["generate"] = figures(seconds, memory, counted, count * args.generate)
            on_gpu = default_device().type == "cuda"
            limits = {"merged": 1.1, "mixed": 1.5 if on_gpu else 1.1 * m}
            show(f"{args.generate} tokens after {count} prompts, {m} adapters", "tokens", result["generate"], limits)
    if args.json:
        used = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        write_json(args.json, {"machine": about, "arguments": used, "mean_tokens": statistics.mean(lengths), **result})


if __name__ == "__main__":
    main(sys.argv[1:])
