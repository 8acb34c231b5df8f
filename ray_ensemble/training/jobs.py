"""Adapters as Ray Train jobs: a `TorchTrainer` for every group or pack of small groups, as many at once as resources allow."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray_ensemble.config import JobConfig, TrainingConfig
from ray_ensemble.errors import InputError, RunError
from ray_ensemble.files import read_json, sha256_json, write_json
from ray_ensemble.metrics import Figures, current_figures
from ray_ensemble.progress import Bar, console
from ray_ensemble.runtime import (
    cluster_cpus,
    cluster_gpus,
    may_grow,
    node_resources,
    release_orphaned_groups,
    shortfall,
    watches_preemption,
)
from ray_ensemble.storage import bring, drop, run_copy, run_of, train_storage
from ray_ensemble.tasks import EncodedTask
from ray_ensemble.training.background import in_background
from ray_ensemble.training.cache import AdapterJob, TrainedAdapter, finished, job_key
from ray_ensemble.training.callbacks import group_release, interruption_watch, is_lost_actor, is_memory_kill
from ray_ensemble.training.loggers import check_loggers
from ray_ensemble.training.pack import Pack, interruptions, note_interruption, read_row, step_lost
from ray_ensemble.training.packing import packs, shared_workers, side_by_side
from ray_ensemble.training.worker import train_worker

_CONTROLLER_FAILURES = 3  # a group of workers that does not start in time counts as one
_ORPHAN_S = 5.0  # for Ray to notice that a failed job's controller is gone
_LOOK_SECONDS = 5.0  # between looks for logs of workers that do not see the folder
_IF_PACKED = ", or from the start where other adapters are packed together than before"
FAILURES = "failures.json"


def train_adapters(
    jobs: Sequence[AdapterJob],
    tasks: Sequence[EncodedTask],
    config: JobConfig,
    folder: Path,
    model: dict[str, Any],
    base: dict[str, str],
) -> dict[str, TrainedAdapter]:
    """Train every job that is not in the cache, side by side; biggest first.

    Args:
        jobs: adapters wanted.
        tasks: all encoded tasks of the run.
        config: the job.
        folder: the run folder; adapters go to `trained/<key>`, Ray Train's checkpoints to `checkpoints/<name of the pack>`.
        model: what a worker needs to load the base: source, quantization, initial adapter folder, pad id.
        base: hashes of the base and of θ₀, part of the cache's keys.

    Returns:
        Job name -> trained adapter.

    Raises:
        InputError: a job asks for more than the cluster has, or for a logger that is not installed.
        RunError: jobs failed for good. The others are finished first and kept, `failures.json` in the run folder names those
            that failed, and the message says what to do.
        ValueError: two different jobs have one name.
    """
    check_loggers(config.training.loggers)
    keys: dict[str, str] = {}
    for job in jobs:
        key = job_key(job, tasks, config, base)
        if keys.setdefault(job.name, key) != key:
            raise ValueError(f"two different adapters are called {job.name!r}")
    wanted: dict[str, AdapterJob] = {}
    for job in jobs:
        if finished(folder, keys[job.name]) is None:
            wanted.setdefault(keys[job.name], job)
    failures = _run_all(wanted, tasks, config.training, folder, model) if wanted else {}
    done = {job.name: finished(folder, keys[job.name]) for job in jobs}
    failed = {job.name: failures.get(keys[job.name], "it left no adapter") for job in jobs if done[job.name] is None}
    if failed:
        raise _partial(failed, done, folder, config.training.pack > 1)
    (folder / FAILURES).unlink(missing_ok=True)
    return {name: adapter for name, adapter in done.items() if adapter is not None}


def _partial(
    failed: Mapping[str, str], done: Mapping[str, TrainedAdapter | None], folder: Path, packed: bool
) -> RunError:
    """The end of a run that trained only some of its adapters; what is known of it is written down."""
    trained = [name for name, adapter in done.items() if adapter is not None]
    try:
        write_json(folder / FAILURES, {"status": "partial", "trained": trained, "failed": dict(failed)})
    except OSError as error:  # a full disk may be why they failed
        console.print(f"{folder / FAILURES}: cannot be written ({error.strerror})", markup=False)
    lines = "".join(f"\n  {name}: {reason}" for name, reason in failed.items())
    return RunError(
        f"{len(failed)} of {len(done)} adapters could not be trained ({len(trained)} are kept):{lines}\n"
        f"The same command trains only these again, from their last checkpoints{_IF_PACKED if packed else ''}."
    )


@dataclass(frozen=True)
class _Demand:
    """What one pack asks of the cluster: workers, and CPUs and GPUs of each."""

    workers: int
    cpus: float
    gpus: float

    @property
    def bundles(self) -> list[dict[str, float]]:
        """The workers' resources."""
        return [{"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})] * self.workers


def _run_all(
    wanted: Mapping[str, AdapterJob],
    tasks: Sequence[EncodedTask],
    training: TrainingConfig,
    folder: Path,
    model: dict[str, Any],
) -> dict[str, str]:
    """Train `wanted` (by key); why a job failed, for those that did."""
    keys = list(wanted)
    longest = max(job.steps for job in wanted.values())
    # A job that waits for resources costs a controller process that polls, so no more are submitted than fit.
    if training.workers == "auto":
        held = _fitting(_demand(training, 1)) if training.concurrency == "auto" else training.concurrency
        workers = shared_workers([job.steps for job in wanted.values()], held, training.batch_size)
        at_once = side_by_side(workers, held)
    else:
        workers = [training.workers_of(job.steps, longest) for job in wanted.values()]
        fitting = side_by_side(workers, _fitting(_demand(training, 1)))
        wanted_at_once = fitting if training.concurrency == "auto" else training.concurrency
        at_once = wanted_at_once if may_grow() else min(wanted_at_once, fitting)
    demands = {key: _demand(training, count) for key, count in zip(wanted, workers, strict=True)}
    ordered = [
        _named({keys[i]: wanted[keys[i]] for i in pack})
        for pack in packs([wanted[key].steps for key in keys], training.pack, at_once)
    ]
    total = sum(job.steps for job in wanted.values())
    _bring_told(ordered, folder)
    begun = sum(
        int(row["step"]) + 1 for pack in ordered for key in pack.jobs if (row := _last_row(pack.log(folder, key)))
    )
    failures: dict[str, str] = {}
    runs = [
        _PackRun(pack, _members(pack, tasks), training, demands[next(iter(pack.jobs))], folder, model)
        for pack in ordered
    ]
    with (
        Bar(f"training {len(wanted)} adapters", total, "steps", begun) as bar,
        in_background([run.to_its_end for run in runs], at_once) as futures,
    ):
        stop = threading.Event()
        figures = current_figures()
        watcher = threading.Thread(target=_watch, args=(ordered, folder, bar, begun, figures, stop), daemon=True)
        watcher.start()
        try:
            for future, pack in zip(futures, ordered, strict=True):
                error = future.exception()
                bring(folder, pack.failed, *(f"trained/{key}" for key in pack.jobs))
                for key in pack.jobs:
                    if (record := pack.failure(folder, key)).exists():
                        failures[key] = read_json(record, "record of a failure")["reason"]
                    elif error is not None:
                        failures[key] = _reason(error, demands[key])
                if not failures.keys() & pack.jobs.keys():
                    drop(folder, f"checkpoints/{pack.name}")
        finally:
            stop.set()
            watcher.join()
    figures.count("ensemble_adapters_failed", len(failures))
    if failures:
        _await_orphans()
    return failures


def _await_orphans() -> None:
    """Give back what the controllers of failed jobs left held. Ray knows of their end a little later than we do."""
    deadline = time.monotonic() + _ORPHAN_S
    while not release_orphaned_groups() and time.monotonic() < deadline:
        time.sleep(0.5)


def _named(jobs: dict[str, AdapterJob]) -> Pack:
    """A pack under a name that the same jobs always have: Ray Train goes on from the checkpoints of that name."""
    return Pack(next(iter(jobs)) if len(jobs) == 1 else sha256_json(list(jobs))[:20], jobs)


def _members(pack: Pack, tasks: Sequence[EncodedTask]) -> list[EncodedTask]:
    """All tasks of a pack, in the run's order."""
    names = {name for job in pack.jobs.values() for name in job.members}
    return [task for task in tasks if task.name in names]


def _demand(training: TrainingConfig, workers: int) -> _Demand:
    """What a job of so many workers asks for.

    Raises:
        InputError: a cluster that does not grow can never give it.
    """
    gpus = (1.0 if cluster_gpus() else 0.0) if training.gpus == "auto" else training.gpus
    if not may_grow() and (workers * training.cpus > cluster_cpus() or workers * gpus > cluster_gpus()):
        raise InputError(
            f"training asks for {workers * training.cpus:g} CPUs and {workers * gpus:g} GPUs a job, the cluster has "
            f"{cluster_cpus()} CPUs and {cluster_gpus()} GPUs: lower training.cpus, training.gpus or training.workers"
        )
    return _Demand(workers, training.cpus, gpus)


def _fitting(demand: _Demand) -> int:
    """How many such jobs the cluster holds at once; one at least, which a cluster that grows may get room for.

    A worker is on one node, and a share of a GPU on one GPU.
    """
    places = sum(_places(node.get("CPU", 0.0), node.get("GPU", 0.0), demand) for node in node_resources())
    return max(1, places // demand.workers)


def _places(cpus: float, gpus: float, demand: _Demand) -> int:
    """Workers of such a job that a node with so many CPUs and GPUs holds."""
    slack = 1e-9  # tenths are no binary fractions
    fitting = int(cpus / demand.cpus + slack)
    if not demand.gpus:
        return fitting
    on_gpus = int(gpus / demand.gpus + slack) if demand.gpus >= 1 else int(gpus) * int(1 / demand.gpus + slack)
    return min(fitting, on_gpus)


@dataclass(frozen=True)
class _PackRun:
    """One pack as a Ray Train run: its jobs, the tasks they train on, what it asks of the cluster, and where it is kept."""

    pack: Pack
    members: list[EncodedTask]
    training: TrainingConfig
    demand: _Demand
    folder: Path
    model: dict[str, Any]

    def to_its_end(self, given_up: threading.Event) -> None:
        """Train; a run ended by a memory kill or a lost node is run again, from its last checkpoint, `max_failures` times.

        Ray Train would restart the worker, but meets the kill once more when it shuts the dead worker down, and a node's
        loss perhaps as it starts one: it takes that for a failure of its own, which it never tries again. Once `given_up`
        is set, nothing is.
        """
        drop(self.folder, self.pack.failed)
        for left in reversed(range(self.training.max_failures + 1)):
            noted = self._memory_kills()
            try:
                self._trainer().fit()
                return
            except Exception as error:
                memory = is_memory_kill(error)
                if given_up.is_set() or not left or not (memory or is_lost_actor(error)):
                    raise
                if not memory:
                    reason = _reason(error, self.demand)
                    told = f"{_titles(self.pack)}: lost an actor; goes on from the last checkpoint ({reason})"
                    console.print(told, markup=False, soft_wrap=True)
                elif self._memory_kills() == noted:
                    with run_copy(run_of(self.folder), self.pack.read_by(1)) as copy:
                        note_interruption(self.pack.folder(copy.folder), "memory")

    def _memory_kills(self) -> int:
        """How often a worker of the pack was killed for its memory, as far as it was written down."""
        with run_copy(run_of(self.folder), self.pack.read_by(1)) as copy:
            return interruptions(self.pack.folder(copy.folder)).count("memory")

    def _trainer(self) -> Any:
        import ray.train
        from ray.train.torch import TorchConfig, TorchTrainer

        training, demand, run = self.training, self.demand, run_of(self.folder)
        once = 60.0 * training.wait_minutes / (_CONTROLLER_FAILURES + 1)
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(once)
        return TorchTrainer(
            train_worker,
            train_loop_config={
                "pack": self.pack,
                "tasks": self.members,
                "training": training.model_copy(update={"workers": demand.workers}),
                "run": run,
                "model": self.model,
                "watched": watches_preemption(),
            },
            torch_config=TorchConfig(backend="nccl" if demand.gpus else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=demand.workers, use_gpu=bool(demand.gpus), resources_per_worker=demand.bundles[0]
            ),
            run_config=ray.train.RunConfig(
                name=self.pack.name,
                **train_storage(self.folder),
                failure_config=ray.train.FailureConfig(
                    max_failures=training.max_failures,
                    max_preemption_failures=training.max_preemptions,
                    controller_failure_limit=_CONTROLLER_FAILURES,
                ),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
                callbacks=[interruption_watch(run, self.pack), group_release()],
            ),
        )


@dataclass
class _Told:
    """What the watcher has told of one job."""

    step: int = 0
    batch_tokens: int | None = None
    trained: bool = False


def _bring_told(running: Sequence[Pack], folder: Path) -> None:
    """Bring the logs of workers that do not see the folder."""
    with suppress(InputError, RunError):  # the progress of workers elsewhere is late, then
        bring(folder, *(name for pack in running for name in pack.told()))


def _last_row(log: Path) -> dict[str, Any] | None:
    """The last whole row of a log, if there is one."""
    return read_row((log.read_text().splitlines() or [""])[-1]) if log.exists() else None


def _watch(
    running: Sequence[Pack], folder: Path, bar: Bar, begun: int, figures: Figures, stop: threading.Event
) -> None:
    """Turn the workers' logs into progress, and tell where memory made micro-batches smaller.

    `begun` steps are those of earlier runs, which the bar knows of.
    """
    told = {key: _Told() for pack in running for key in pack.jobs}
    seen, looked = begun, time.monotonic()
    interrupted = {pack.name: len(interruptions(pack.folder(folder))) for pack in running}  # those of earlier runs too
    while True:
        ended = stop.wait(1.0)
        release_orphaned_groups()  # or the jobs beside a failed one would wait for what it held
        notes = []
        if time.monotonic() - looked > _LOOK_SECONDS:
            looked = time.monotonic()
            _bring_told(running, folder)
        for pack in running:
            for reason in interruptions(pack.folder(folder))[interrupted[pack.name] :]:
                interrupted[pack.name] += 1
                figures.count("ensemble_training_interruptions", reason=reason)
                console.print(f"{_titles(pack)}: interrupted ({reason})", markup=False)
            for key, job in pack.jobs.items():
                if (folder / "trained" / key / "result.json").exists():
                    figures.count("ensemble_adapters_trained", int(not told[key].trained))
                    told[key] = replace(told[key], step=job.steps, trained=True)
                    continue
                if (last := _last_row(pack.log(folder, key))) is None:
                    continue
                tokens = last.get("batch_tokens")
                if tokens != told[key].batch_tokens:
                    figures.count("ensemble_memory_halvings")
                    console.print(
                        f"{job.name}: memory ran out; micro-batches of {tokens} tokens from here", markup=False
                    )
                told[key] = _Told(int(last["step"]) + 1, tokens)
                notes.append(f"{job.name} loss {last['loss']:.2f}")
        steps = sum(each.step for each in told.values())
        if steps > seen:
            bar.advance(steps - seen, ", ".join(notes))
            seen = steps
        if ended:
            return


def _titles(pack: Pack) -> str:
    return ", ".join(job.name for job in pack.jobs.values())


def _reason(error: BaseException, demand: _Demand) -> str:
    """Why a job failed, in a line, with what to do where that is known."""
    cause = getattr(error, "worker_failures", None)
    if isinstance(cause, dict) and cause:
        lost = next(filter(None, map(step_lost, cause.values())), None)
        if lost is not None:
            return str(lost)  # the other workers only lost the connection
        error = next(iter(cause.values()))
    text = str(error).strip()
    lines = [line for line in text.splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"
    if "No space left on device" in text:
        return f"the disk of the run folder is full; free some space ({reason})"
    if is_memory_kill(error):
        return f"killed for its memory, also with smaller micro-batches; lower training.concurrency ({reason})"
    if "Insufficient cluster resources" in text:  # what an autoscaler may start at most is less
        most = next((line.strip() for line in lines if "maximum" in line), reason)
        return f"the cluster can never give what is asked for: {shortfall(demand.bundles)} ({most})"
    if type(getattr(error, "controller_failure", error)).__name__ == "WorkerGroupStartupTimeoutError":
        return f"no worker could start in training.wait_minutes: {shortfall(demand.bundles)}"
    return reason
