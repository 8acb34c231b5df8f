"""What runs on a Ray Train worker: load, resume, train, report checkpoints, leave each adapter in the run folder."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_ensemble.config import TrainingConfig
from ray_ensemble.errors import InputError, RunError
from ray_ensemble.files import jsonl_appender, read_json, sha256_file, whole_folder, write_json
from ray_ensemble.runtime import peak_memory_bytes
from ray_ensemble.storage import adapter_copy, run_copy
from ray_ensemble.tasks import EncodedTask
from ray_ensemble.training.cache import ADAPTER_FILES, AdapterJob
from ray_ensemble.training.learner import TrainingState
from ray_ensemble.training.loggers import Log, open_loggers
from ray_ensemble.training.pack import Pack, StepLost, note_interruption, read_row, smaller_budget

if TYPE_CHECKING:
    from ray_ensemble.training.parallel import Workers


def train_worker(settings: dict[str, Any]) -> None:
    """Train a pack.

    What another attempt would only meet again (a loss that is no number, an example that does not fit) is written down and ends
    the job. Whatever is raised makes Ray Train try again from the last checkpoint.

    Args:
        settings: {"pack", "tasks" (of all its jobs), "training", "run" (what `storage.run_of` gives), "model", "watched" (whether
            Ray Train passes on notices of pre-emption)}.
    """
    import ray.train

    pack, rank = settings["pack"], ray.train.get_context().get_world_rank()
    with run_copy(settings["run"], pack.read_by(rank)) as copy:
        _train_pack({**settings, "folder": copy.folder, "send": copy.send})


def _train_pack(settings: dict[str, Any]) -> None:
    """As `train_worker`; "folder" is the run folder or this worker's copy of it, and "send" puts up what is new in a copy."""
    import ray.train
    import torch

    from ray_ensemble.models import attach_adapters, default_device, load_base, materialise, quiet_libraries
    from ray_ensemble.training.parallel import make_workers

    pack: Pack = settings["pack"]
    folder, source = settings["folder"], settings["model"]
    if all(pack.failure(folder, key).exists() for key in pack.jobs):
        return  # written down by an attempt that could not end all of its workers alike
    device = default_device()
    training = within_memory(settings["training"], pack.folder(folder), device.type)
    quiet_libraries()
    torch.set_num_threads(training.threads)
    started = time.monotonic()
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())  # Ray Train has chosen this worker's
    workers = make_workers(training)
    leads = workers.rank == 0
    starts = {
        name: adapter_copy(job.start.folder if job.start is not None else source["initial_adapter"])
        for name, job in _names(pack).items()
    }
    where, quantization = materialise(source["source"]), source["quantization"]
    if len(starts) == 1:
        model = workers.load(where, quantization, next(iter(starts.values())), device)
    else:
        model = attach_adapters(load_base(where, quantization, device), starts)
    checkpoint = ray.train.get_checkpoint()
    if leads:
        _cut_logs(pack, folder, checkpoint)
    try:
        with checkpoint.as_directory() if checkpoint is not None else nullcontext() as resume:
            states = _train(model, pack, settings, training, workers, resume)
    except StepLost as error:
        _leave_word(pack, folder, error)
        settings["send"]()
        raise
    except (InputError, RunError) as error:
        states = {name: TrainingState(failed=str(error)) for name in starts}
    seconds = time.monotonic() - started
    peak = workers.most(peak_memory_bytes(), device)
    tokens = sum(state.tokens for state in states.values() if not state.failed)
    with workers.whole_adapter(model) if tokens else nullcontext():
        for (name, job), key in zip(_names(pack).items(), pack.jobs, strict=True):
            state = states[name]
            if leads and state.failed:
                write_json(pack.failure(folder, key), {"reason": state.failed})
            elif leads:
                # Adapters of a pack share a process; each is charged its share of the rows' tokens.
                cost = {"seconds": seconds * state.tokens / tokens, "peak_memory_bytes": peak}
                _keep(model, name, job, state, cost, pack.log(folder, key), folder / "trained" / key)


def _leave_word(pack: Pack, folder: Path, lost: StepLost) -> None:
    """Tell the next attempt that a micro-batch did not fit; or, where there is none smaller, that none should be made."""
    if lost.tokens:
        note_interruption(pack.folder(folder), "memory", lost.tokens)
        return
    for key in pack.jobs:
        write_json(pack.failure(folder, key), {"reason": str(lost)})


def _names(pack: Pack) -> dict[str, AdapterJob]:
    """The jobs by the names that their adapters have in the model."""
    if len(pack.jobs) == 1:
        return {"default": next(iter(pack.jobs.values()))}
    return {f"adapter-{key}": job for key, job in pack.jobs.items()}


def _train(
    model: Any, pack: Pack, settings: dict[str, Any], training: TrainingConfig, workers: Workers, resume: str | None
) -> dict[str, TrainingState]:
    """Final state of every adapter, by its name in the model."""
    import ray.train

    from ray_ensemble.training.loop import train_adapter
    from ray_ensemble.training.together import AdapterRun, train_together

    folder, pad_id = settings["folder"], settings["model"]["pad_id"]
    tasks: dict[str, EncodedTask] = {task.name: task for task in settings["tasks"]}

    def on_checkpoint(step: int, save: Callable[[Path], None]) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            save(Path(temporary))
            settings["send"]()  # the log has all steps of a checkpoint before there is one
            ray.train.report(
                {"step": step},
                checkpoint=ray.train.Checkpoint.from_directory(temporary) if leads else None,
                checkpoint_dir_name=f"step-{step:06d}",
            )

    def preempted() -> bool:
        return settings["watched"] and ray.train.get_preemption_info() is not None

    def members(job: AdapterJob) -> tuple[EncodedTask, ...]:
        # In the run's order, which is the order that the sampler counts in.
        return tuple(task for name, task in tasks.items() if name in job.members)

    names, leads = _names(pack), workers.rank == 0
    with ExitStack() as stack:
        logs = {
            name: stack.enter_context(_logging(pack, key, job, training, folder)) if leads else _unseen
            for (name, job), key in zip(names.items(), pack.jobs, strict=True)
        }
        at = Path(resume) if resume else None
        if len(names) == 1:
            [(name, job)] = names.items()
            state = train_adapter(
                model, members(job), training, job.steps, job.seed, pad_id, workers=workers,
                resume=at, on_step=logs[name], on_checkpoint=on_checkpoint, preempted=preempted,
            )  # fmt: skip
            return {name: state}
        runs = [AdapterRun(name, members(job), job.steps, job.seed) for name, job in names.items()]
        return train_together(
            model, runs, training, pad_id,
            resume=at, on_step=lambda name, row: logs[name](row), on_checkpoint=on_checkpoint, preempted=preempted,
        )  # fmt: skip


def _unseen(row: dict[str, Any]) -> None:
    """What workers but the first do with a row of the log."""


@contextmanager
def _logging(pack: Pack, key: str, job: AdapterJob, training: TrainingConfig, folder: Path) -> Iterator[Log]:
    """A function that appends to a job's log, and shows the row where that was asked for."""
    file = pack.log(folder, key)
    begun = len(file.read_text().splitlines()) if file.exists() else 0
    append = jsonl_appender(file)
    with open_loggers(training.loggers, folder, job.name, key, begun) as show:

        def log(row: dict[str, Any]) -> None:
            append(row)
            show(row)

        yield log


def _keep(
    model: Any, name: str, job: AdapterJob, state: TrainingState, cost: dict[str, float], log: Path, target: Path
) -> None:
    """Write a trained adapter, its log and what it cost, whole or not at all."""
    from ray_ensemble.models import save_adapter

    rows = [read for line in log.read_text().splitlines() if (read := read_row(line)) is not None]
    tail = [row["loss"] for row in rows[-20:]]
    with whole_folder(target) as temporary:
        save_adapter(model, temporary, name)
        shutil.copy(log, temporary / "train.jsonl")
        write_json(
            temporary / "result.json",
            {
                "members": list(job.members),
                "seed": job.seed,
                "steps": state.step,
                "best_step": state.best_step,
                "tokens": state.tokens,
                "validation_tokens": state.validation_tokens,
                "final_loss": sum(tail) / len(tail),
                **cost,
                "files": {file: sha256_file(temporary / file) for file in ADAPTER_FILES},
            },
        )


def within_memory(training: TrainingConfig, checkpoints: Path, device: str) -> TrainingConfig:
    """The settings with the micro-batches that earlier attempts on such a device leave (`pack.smaller_budget`)."""
    return training.model_copy(update={"batch_tokens": smaller_budget(checkpoints, training.tokens_of(device))})


def _cut_logs(pack: Pack, folder: Path, checkpoint: Any) -> None:
    """Drop the logs' rows after the checkpoint, or all where there is none; they are about to be made again."""
    if checkpoint is None:
        shutil.rmtree(pack.folder(folder) / "logs", ignore_errors=True)
        return
    with checkpoint.as_directory() as resume:
        for name, key in zip(_names(pack), pack.jobs, strict=True):
            state = Path(resume) / ("." if len(pack.jobs) == 1 else name) / "state.json"
            step = read_json(state, "checkpoint")["step"] if state.exists() else 0
            log = pack.log(folder, key)
            lines = log.read_text().splitlines() if log.exists() else []
            kept = [line for line in lines if (row := read_row(line)) is not None and row["step"] < step]
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("".join(f"{line}\n" for line in kept))
