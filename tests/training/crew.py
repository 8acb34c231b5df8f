"""Processes that train one adapter together over gloo, without Ray: a worker of `train_adapter` each."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ray_ensemble.config import TrainingConfig
from ray_ensemble.tasks import EncodedTask

ANSWER_SECONDS = 300
GRACE_SECONDS = 30
_LIBRARIES = ("ray_ensemble.training.fsdp", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama")


@dataclass(frozen=True)
class Training:
    """What every worker is told. `memory`: tokens that a worker's device holds, by rank; a larger batch does not fit."""

    model: Path
    initial: Path
    tasks: list[EncodedTask]
    config: TrainingConfig
    steps: int = 8
    quantization: str = "none"
    resume: Path | None = None
    keep: Path | None = None  # checkpoints are saved here, a folder a step
    leave: Path | None = None  # the adapter is saved here
    die_at: int | None = None  # the first worker is killed after the checkpoint of this step
    memory: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """What a worker has to say: its log, its adapter, its final state; or its error, by type and text."""

    rows: list[dict[str, Any]]
    adapter: dict[str, torch.Tensor]
    state: Any
    passes: list[int]  # padded tokens of each pass
    held: int = 0  # bytes of the base's weights in this worker when the first pass begins
    error: str = ""


class Crew:
    """Workers, started once and told one training after the other."""

    def __init__(self, count: int) -> None:
        self.count = count
        # Libraries are imported once, in a process that all workers are forked from.
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*_LIBRARIES, __name__])
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            arguments = (rank, count, f"{self._folder.name}/rendezvous", theirs)
            process = context.Process(target=_main, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._folder.cleanup()

    def train(self, training: Training) -> list[Trained]:
        """Let all workers train; what each has to say.

        A worker that died has said nothing but that. Where one failed, the others may wait for it; the crew is of no use then.
        """
        for pipe in self._pipes:
            pipe.send(training)
        said: dict[int, Trained] = {}
        patience = ANSWER_SECONDS
        while len(said) < self.count:
            waited = [pipe for rank, pipe in enumerate(self._pipes) if rank not in said]
            ready = wait(waited, patience)
            assert ready or patience < ANSWER_SECONDS, "the workers do not answer"
            for rank, pipe in enumerate(self._pipes):
                if pipe in ready:
                    try:
                        said[rank] = pipe.recv()
                    except EOFError:
                        said[rank] = Trained([], {}, None, [], error="died")
                    patience = GRACE_SECONDS if said[rank].error else patience
                elif not ready and rank not in said:
                    said[rank] = Trained([], {}, None, [], error="waits for another worker")
        return [said[rank] for rank in range(self.count)]


def _main(rank: int, count: int, rendezvous: str, pipe: Connection) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=ANSWER_SECONDS),
    )
    while True:
        training: Training = pipe.recv()
        rows: list[dict[str, Any]] = []
        passes: list[int] = []
        try:
            pipe.send(_train(training, rank, rows, passes))
        except Exception as error:
            pipe.send(Trained(rows, {}, None, passes, error=f"{type(error).__name__}: {error}"))


def _train(training: Training, rank: int, rows: list[dict[str, Any]], passes: list[int]) -> Trained:
    from ray_ensemble.models import save_adapter
    from ray_ensemble.training import train_adapter
    from ray_ensemble.training.parallel import make_workers

    workers = make_workers(training.config)
    model = workers.load(training.model, training.quantization, training.initial, torch.device("cpu"))

    held: list[int] = []

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        if not held:
            held.append(sum(_held_bytes(p) for name, p in model.named_parameters() if "lora_" not in name))
        passes.append(kwargs["input_ids"].numel())
        if passes[-1] > training.memory.get(rank, passes[-1]):
            raise torch.OutOfMemoryError("full")

    def keep(step: int, save: Any) -> None:
        if training.keep is None:
            return
        folder = training.keep / f"{step}"
        folder.mkdir(parents=True, exist_ok=True)
        save(folder)
        if step == training.die_at:
            torch.distributed.barrier()
            if rank == 0:
                os.kill(os.getpid(), 9)

    model.register_forward_pre_hook(enter, with_kwargs=True)
    state = train_adapter(
        model, training.tasks, training.config, training.steps, 3, 0,
        workers=workers, resume=training.resume, on_step=rows.append, on_checkpoint=keep,
    )  # fmt: skip
    with workers.whole_adapter(model):
        adapter = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        if rank == 0 and training.leave is not None:
            save_adapter(model, training.leave, "default")
    return Trained(rows, adapter, state, passes, held[0])


def _held_bytes(parameter: Any) -> int:
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3
        local = parameter if parameter.numel() else parameter.ds_tensor
    else:
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # FSDP2
    return int(local.numel() * local.element_size())
