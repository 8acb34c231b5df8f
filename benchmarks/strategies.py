"""What a worker of two holds, and how long a step takes, under each `training.strategy`; with the quickstart's model and data.

    python benchmarks/strategies.py --json FILE

Memory is a worker's resident set on a CPU, in which the libraries take what the column "before" says, and the GPU's where
there is one for each. The peak of training leaves out loading. Losses are compared with the first strategy's.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from shard_peers import RETURN_FREED_MEMORY, peak_bytes, process_device, reset_peak, resident_bytes

from ray_ensemble.config import AdapterConfig, JobConfig, load_config
from ray_ensemble.models import draw_initial_adapter, load_base, load_tokenizer, materialise, quiet_libraries
from ray_ensemble.stages import encode_all
from ray_ensemble.tasks import EncodedTask, load_tasks

JOB = Path(__file__).parent.parent / "examples" / "quickstart.yaml"
STRATEGIES = ("none", "zero2", "zero3", "fsdp2")
WORKERS = 2
MIB = 2**20


def measure(rank: int, folder: str, strategy: str, steps: int, job: JobConfig, tasks: list[EncodedTask]) -> None:
    """One worker: train a few steps, and leave what it held as `<rank>.json`."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORKERS), LOCAL_SIZE=str(WORKERS))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    from ray_ensemble.training import train_adapter
    from ray_ensemble.training.parallel import make_workers

    quiet_libraries()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    device = process_device(rank, WORKERS)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORKERS,
    )
    training = job.training.model_copy(update={"strategy": strategy, "workers": WORKERS})
    workers = make_workers(training)
    facts: dict[str, Any] = {"before": resident_bytes()}
    reset_peak(device)
    model = workers.load(materialise(job.model.source), "none", Path(folder) / "init", device)
    facts["loading"] = peak_bytes(device)
    rows: list[dict[str, Any]] = []

    def take_note(row: dict[str, Any]) -> None:
        rows.append(row)
        if len(rows) == 1:  # the first step warms up: DeepSpeed takes the model over, allocators fill
            reset_peak(device)

    train_adapter(model, tasks, training, steps, 0, 0, workers=workers, on_step=take_note)
    facts["training"] = peak_bytes(device)
    facts["seconds_per_step"] = sum(row["seconds"] for row in rows[1:]) / len(rows[1:])
    facts["losses"] = [row["loss"] for row in rows]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(facts))
    torch.distributed.barrier()
    os._exit(0)  # leave without the libraries' clean-up


def run(strategy: str, steps: int, job: JobConfig, tasks: list[EncodedTask]) -> list[dict[str, Any]]:
    """All workers of one strategy."""
    with tempfile.TemporaryDirectory() as folder:
        draw_initial_adapter(
            load_base(materialise(job.model.source), "none", torch.device("cpu")),
            AdapterConfig(),
            Path(folder) / "init",
        )
        context = torch.multiprocessing.get_context("spawn")
        arguments = (folder, strategy, steps, job, tasks)
        processes = [context.Process(target=measure, args=(rank, *arguments)) for rank in range(WORKERS)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(WORKERS)]


def main() -> None:
    """Measure, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument(
        "--steps", type=int, default=6, help="steps of each strategy, the first of which is not counted"
    )
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    options = parser.parse_args()
    quiet_libraries()
    os.environ.update(RETURN_FREED_MEMORY)  # read when the workers start
    job = load_config(JOB)
    tokenizer = load_tokenizer(materialise(job.model.source))
    tasks = encode_all(load_tasks(job.tasks, job.limits, JOB.parent), tokenizer, job)
    found: dict[str, Any] = {}
    print("strategy  MiB before   loading  training   s/step  losses")
    for strategy in options.strategies:
        started = time.monotonic()
        facts = run(strategy, options.steps, job, tasks)
        first = found.get(options.strategies[0], {"losses": facts[0]["losses"]})
        found[strategy] = {
            **{key: max(one[key] for one in facts) for key in ("before", "loading", "training", "seconds_per_step")},
            "losses": facts[0]["losses"],
            "loss_difference": max(abs(a / b - 1) for a, b in zip(facts[0]["losses"], first["losses"], strict=True)),
            "seconds": time.monotonic() - started,
        }
        row = found[strategy]
        memory = " ".join(f"{row[key] / MIB:9.0f}" for key in ("before", "loading", "training"))
        print(f"{strategy:8} {memory} {row['seconds_per_step']:8.2f} {row['loss_difference']:8.1e}", flush=True)
    options.json.write_text(json.dumps({"workers": WORKERS, "steps": options.steps, "strategies": found}, indent=2))


if __name__ == "__main__":
    main()
