"""Per-example LoRA gradient collection against its floor and against other ways to do it.

    python benchmarks/gradients.py --json gradients.json                   # SmolLM2-135M on the quickstart's tasks
    python benchmarks/gradients.py --shape 1b --peak-tflops 989            # random Llama of that shape, bf16 on a GPU
    python benchmarks/gradients.py --projection-scale --json scale.json    # gradient buffer and projection, D = 40 million

What is measured. N training examples of the job's tasks, sorted by length, in batches of 8. Before anything is timed, features
(or, for bergson, whose random matrices are its own, gradients) of all contenders are compared; if they differ, nothing is
printed but the difference. Then, in rounds, every contender does all batches once, in an order that rotates from round to round;
a ratio to the floor is taken within its round. Printed are medians, smallest and largest. Tokens are those that are not padding.
On a machine that does other work, `--clock cpu` takes the process's own time.

- forward: label scores and margins, no graph. For reference.
- floor: forward and backward to activations on the bare base, from the output of the lowest adapted layers on, as ours does;
  nothing captured, nothing projected.
- ours: `GradientCollector`. ours-unprojected: the same with a projection whose `apply` returns zeros, so that the difference
  is the projection's share.
- authors: the method of the papers' code: one forward a batch, `torch.autograd.grad` of each margin on the retained graph, all
  gradients times a dense D×d matrix.
- batch-one: forward, backward and `.grad` an example, without padding; dense matrix.
- vmap: `torch.func.vmap(torch.func.grad)` over a functional call; eager attention (sdpa has no batching rule on a
  CPU) with a ready-made mask; dense matrix. One call a batch.
- bergson, bergson-global: bergson's `InMemoryCollector` around our forward and backward passes (its own loop differentiates a
  causal-LM loss and takes the logits of every position). It hooks the same lora_B modules. Its default projects each module's
  gradient to p×p by two matrices that it keeps, so d is p² times the number of modules, the nearest to ours, and no
  map is shared by modules; "global" is one vector of d entries, of matrices made anew at every batch. To its advantage the
  graph starts at the embedding's output; its own set-up also takes the gradient of the embedding table. It needs the
  adapter switched on (ours and the floor run the bare base, the same at B = 0).

At B = 0 the gradient of A is zero. The peers skip it too, although the authors' code and bergson's set-up take both halves;
`--with-a` makes them do so. Making the dense matrix is not timed, but is in its owner's memory.

Extra memory is the peak above the loaded model after one forward pass: on a CPU in a fresh process for each contender (resident
set), on a GPU `max_memory_allocated`. Model FLOPs utilisation is 2·N·tokens for the forward and as much for the backward pass,
N the base's parameters without embeddings, over time and `--peak-tflops`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peers import CONTENDERS, JOB, MODEL, SHAPES, NotRunError, Run, Setup, bergson_unprojected, load
from torch import Tensor

from ray_ensemble.files import write_json
from ray_ensemble.gradients.per_example import ProjectionBuffer
from ray_ensemble.gradients.projection import Projection
from ray_ensemble.models import default_device, quiet_libraries

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PASSES = {"forward": 1}  # passes of 2·N·tokens that a contender needs at least; two unless told


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--model", default=MODEL, help="a model source, as in a job file")
    parser.add_argument("--job", type=Path, default=JOB, help="job file whose tasks give the prompts")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="a random Llama and random prompts instead")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="longest prompt with --shape; shortest is half")
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--dim", type=int, help="d; 400, or 1,024 with --projection-scale")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: the process's own time")
    parser.add_argument("--with-a", action="store_true", help="peers also take the gradients of A, which are zero")
    parser.add_argument("--only", nargs="+", choices=sorted(CONTENDERS), help="these contenders and the floor")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory of each contender")
    parser.add_argument("--tolerance", type=float, help="relative; 1e-4, or 5e-2 in bf16")
    parser.add_argument("--peak-tflops", type=float, help="the device's peak in the model's dtype, for utilisation")
    parser.add_argument("--projection-scale", action="store_true", help="measure the projection alone")
    parser.add_argument("--elements", type=int, default=40_000_000, help="D of --projection-scale")
    parser.add_argument("--modules", type=int, default=480, help="modules that D is spread over")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.clock == "cpu" and (args.threads > 1 or default_device().type != "cpu"):
        parser.error("--clock cpu is the time of one thread on a CPU")
    args.dim = args.dim or (1024 if args.projection_scale else 400)
    return args


# Measuring


def synchronise(device: torch.device) -> None:
    """Wait for the GPU, if there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], object], device: torch.device, clock: str = "wall") -> float:
    """Time of one call."""
    now = CLOCKS[clock]
    gc.collect()
    synchronise(device)
    start = now()
    run()
    synchronise(device)
    return now() - start


def peak_resident() -> int:
    """Peak of this process's resident set in bytes.

    Linux's ru_maxrss will not do: a child begins with its parent's.
    """
    if platform.system() == "Linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def extra_peak(work: Callable[[], object], device: torch.device) -> int:
    """Bytes that `work` held at its peak above what was held before."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    if platform.system() == "Linux":
        # Loading may have held more than the work will: give back what is free, and let the kernel forget the peak.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    before = peak_resident()
    work()
    return peak_resident() - before


def contender_peak(name: str, setup: Setup) -> int:
    """Extra memory of one contender, what it prepares included."""
    CONTENDERS["forward"].build(setup)()  # pages the weights in

    def work() -> None:
        CONTENDERS[name].build(setup)()

    return extra_peak(work, setup.device)


def ask_worker(argv: Sequence[str], name: str) -> dict[str, Any]:
    """Run this program in a fresh process on one measurement of memory."""
    command = [sys.executable, __file__, *argv, "--worker", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603 (ourselves)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def in_turns(runs: dict[str, Run], rounds: int, device: torch.device, clock: str) -> dict[str, list[float]]:
    """Seconds of every run in every round; each round begins with another run."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for r in range(rounds):
        shift = r % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(seconds_of(runs[name], device, clock))
        print(f"round {r + 1} of {rounds} done", file=sys.stderr, flush=True)
    return seconds


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Largest over examples of ‖found − wanted‖ / ‖wanted‖."""
    return float(((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max())


def check(setup: Setup, features: dict[str, Tensor], tolerance: float) -> dict[str, float]:
    """Every comparable contender's relative error against the examples taken one by one.

    Raises:
        SystemExit: one of them is above `tolerance`, or the unprojected run projects.
    """
    if "ours-unprojected" in features and features["ours-unprojected"].any():
        raise SystemExit("ours-unprojected has features that are not zero: it goes around Projection.apply")
    wanted = features["batch-one"] if "batch-one" in features else CONTENDERS["batch-one"].build(setup)()
    errors = {name: relative_error(features[name], wanted) for name in features if CONTENDERS[name].comparable}
    for name in [name for name in features if name.startswith("bergson")][:1]:
        errors[name] = relative_error(bergson_unprojected(setup), wanted)
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    if wrong:
        raise SystemExit(f"gradients differ from those of single examples by more than {tolerance:g}: {wrong}")
    return errors


# Results


@dataclass(frozen=True)
class Row:
    """One contender's line; None where it was not run or not measured."""

    name: str
    what: str
    dim: int | None
    note: str | None
    seconds: list[float] | None = None
    examples_per_second: dict[str, float] | None = None
    tokens_per_second: dict[str, float] | None = None
    ratio_to_floor: dict[str, float] | None = None
    extra_bytes: int | None = None
    utilisation: float | None = None
    relative_error: float | None = None


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    head = ["contender", "d", "examples/s", "(min–max)", "tokens/s", "× floor", "(min–max)", "extra MiB", "MFU"]
    lines = [head]
    for row in rows:
        if row.examples_per_second is None or row.tokens_per_second is None or row.ratio_to_floor is None:
            continue
        speed, ratio = row.examples_per_second, row.ratio_to_floor
        lines.append(
            [
                row.name,
                str(row.dim or ""),
                f"{speed['median']:.2f}",
                f"({speed['min']:.2f}–{speed['max']:.2f})",
                f"{row.tokens_per_second['median']:.0f}",
                f"{ratio['median']:.2f}",
                f"({ratio['min']:.2f}–{ratio['max']:.2f})",
                "" if row.extra_bytes is None else f"{row.extra_bytes / 2**20:.0f}",
                "" if row.utilisation is None else f"{row.utilisation:.1%}",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    return "\n".join(text + [f"{row.name}: not run: {row.note}" for row in rows if row.seconds is None])


def machine(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What the figures were taken on."""
    names: list[str] = []
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "torch": torch.__version__,
        "load_before": os.getloadavg()[0],
    }


def compare(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Check, time and weigh all contenders."""
    about = machine(args, default_device())
    setup, parameters = load(args)
    chosen = [name for name in CONTENDERS if not args.only or name in {*args.only, "floor"}]
    runs: dict[str, Run] = {}
    notes: dict[str, str] = {}
    peaks: dict[str, int] = {}
    for name in chosen:
        try:
            if setup.device.type == "cuda" and not args.no_memory:
                peaks[name] = contender_peak(name, setup)
            runs[name] = CONTENDERS[name].build(setup)
        except NotRunError as reason:
            notes[name] = str(reason)
    tolerance = args.tolerance or (5e-2 if setup.model.dtype == torch.bfloat16 else 1e-4)
    features = {name: run() for name, run in runs.items()}  # this warms up, too
    errors = check(setup, features, tolerance)
    seconds = in_turns(runs, args.rounds, setup.device, args.clock)
    if setup.device.type == "cpu" and not args.no_memory:
        peaks = {name: int(ask_worker(argv, name)["extra_bytes"]) for name in runs}
    rows = []
    for name in chosen:
        taken = seconds.get(name)
        width = None if taken is None or name in {"forward", "floor"} else int(features[name].shape[1])
        row = Row(name, CONTENDERS[name].what, width, notes.get(name))
        if taken is not None:
            flops = 2.0 * parameters * setup.tokens * PASSES.get(name, 2)
            rate = flops / statistics.median(taken) / 1e12
            row = Row(
                name, row.what, width, None, taken,
                spread([setup.examples / s for s in taken]),
                spread([setup.tokens / s for s in taken]),
                spread([s / f for s, f in zip(taken, seconds["floor"], strict=True)]),
                peaks.get(name),
                rate / args.peak_tflops if args.peak_tflops else None,
                errors.get(name),
            )  # fmt: skip
        rows.append(row)
    print(table(rows))
    return {
        "benchmark": "gradients",
        "machine": about,
        "model": f"random Llama, {args.shape}" if args.shape else args.model,
        "dtype": str(setup.model.dtype),
        "attention": setup.model.config._attn_implementation,
        "examples": setup.examples,
        "tokens": setup.tokens,
        "padded_tokens": sum(batch.input_ids.numel() for batch in setup.batches),
        "batch": args.batch,
        "rank": args.rank,
        "alpha": args.alpha,
        "adapter_elements_projected": setup.size,
        "peers_take_a": args.with_a,
        "rounds": args.rounds,
        "clock": args.clock,
        "backbone_parameters": parameters,
        "tolerance": tolerance,
        "contenders": [asdict(row) for row in rows],
    }


# The projection alone


def gemm_rate(n: int, k: int, m: int, device: torch.device, clock: str) -> float:
    """FLOP/s of an fp32 product (n, k) @ (k, m): the best of seven."""
    a, b = torch.randn(n, k, device=device), torch.randn(k, m, device=device)
    out = torch.empty(n, m, device=device)
    return 2.0 * n * k * m / min(seconds_of(lambda: torch.mm(a, b, out=out), device, clock) for _ in range(7))


def project_modules(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds and extra memory of one batch's gradients of D elements on their way through the buffer, module by module."""
    projection = Projection(args.dim, 0, device)
    sizes = [len(range(i, args.elements, args.modules)) for i in range(args.modules)]
    rates = {
        "square": gemm_rate(2048, 2048, 2048, device, args.clock),
        "batch": gemm_rate(args.batch, 8192, args.dim, device, args.clock),
    }
    torch.manual_seed(0)
    gradients = torch.randn(args.batch, max(sizes), device=device)
    projection.apply("warm-up", gradients[:, :4096, None])
    slots = torch.arange(args.batch, device=device)
    taken = 0.0

    def work() -> None:
        nonlocal taken

        def run() -> None:
            buffer = ProjectionBuffer(projection, args.batch, device)
            for i, size in enumerate(sizes):
                # A copy, as the hooks make a new tensor for every module.
                buffer.add(f"module.{i}", slots, gradients[:, :size, None].clone())
            buffer.features()

        taken = seconds_of(run, device, args.clock)

    extra = extra_peak(work, device)
    flops = 2.0 * args.batch * args.elements * args.dim
    return {
        "seconds": taken,
        "extra_bytes": extra,
        "gemm_flops": flops,
        "gemm_flops_per_second": rates,
        "floor_seconds": {name: flops / rate for name, rate in rates.items()},
        "dense_bytes": 4 * args.elements * args.dim,
    }


def project_at_scale(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """The projection alone, in a fresh process."""
    about = machine(args, default_device())
    found = ask_worker(argv, "projection")
    floors = found["floor_seconds"]
    print(f"D = {args.elements:,} in {args.modules} modules, d = {args.dim:,}, {args.batch} gradients")
    print(f"projection           {found['seconds']:9.2f} s, {found['extra_bytes'] / 2**20:,.0f} MiB extra")
    print(f"product alone        {floors['square']:9.2f} s at the rate of a square product (2,048³)")
    print(
        f"product alone        {floors['batch']:9.2f} s at the rate of ({args.batch} × 8,192) @ (8,192 × {args.dim:,})"
    )
    print(f"the matrix stored    {found['dense_bytes'] / 2**30:9.1f} GiB")
    keys = ("elements", "modules", "dim", "batch", "clock")
    return {"benchmark": "projection", "machine": about, **{key: getattr(args, key) for key in keys}, **found}


def main(argv: Sequence[str]) -> None:
    """Measure, print, write."""
    args = arguments(argv)
    quiet_libraries()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.worker == "projection":
        print(json.dumps(project_modules(args, default_device())))
        return
    if args.worker:
        setup, _ = load(args)
        print(json.dumps({"extra_bytes": contender_peak(args.worker, setup)}))
        return
    figures = project_at_scale(args, argv) if args.projection_scale else compare(args, argv)
    if args.json:
        write_json(args.json, figures)


if __name__ == "__main__":
    main(sys.argv[1:])
