"""The search for the best groups: Ray Tune over the number of groups, partition seeds and clustering methods.

A trial clusters the affinity, improves the partition by local search on the estimated objective, and reports it.
Trials share features (once in the object store) and fits (one actor, with a dictionary in front in every process);
actors are reused. Every number depends on the inputs alone, never on how many trials run at once, which of them
fitted a group, or on stops. Where the process that runs the search sees a GPU, it fits the groups of the affinity there,
all at once; that changes estimates by less than 1e-6 of a nat, so that fits on disk hold on either kind of machine.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas
import ray
from numpy.typing import NDArray
from ray import tune
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from ray_ensemble.config import JobConfig, SearchConfig, TrainingConfig
from ray_ensemble.errors import RunError
from ray_ensemble.estimator.affinity import COVER_TASKS, affinity, gradient_similarity, job_subsets
from ray_ensemble.estimator.budget import choose_regularization
from ray_ensemble.estimator.calibration import Truth, calibrate_regularization
from ray_ensemble.estimator.estimator import Estimator, Group, GroupEstimate
from ray_ensemble.estimator.features import TaskFeatures
from ray_ensemble.files import write_json, write_text
from ray_ensemble.grouping.cases import run_case, search_cases
from ray_ensemble.grouping.fitlog import FitLog, Reference, fingerprint
from ray_ensemble.grouping.result import SearchResult, best_result
from ray_ensemble.runtime import shortfall

Progress = Callable[[int, int], None]

COLUMNS = [
    "m",
    "method",
    "seed",
    "regularization",
    "objective",
    "accuracy",
    "start_objective",
    "seconds",
    "fits",
    "reassignment_flops",
    "peak_memory_bytes",
    "partition",
]
TRIAL_RETRIES = 3  # of a trial whose node or process went away
_TRIAL = {"CPU": 1.0}


@dataclass(frozen=True)
class _Inputs:
    """What every trial needs, put in the object store once."""

    features: tuple[TaskFeatures, ...]
    training: TrainingConfig
    regularization: float
    search: SearchConfig
    similarity: NDArray[np.float64]


class _Shared:
    """The actor that trials share: a reference to the inputs and all fits so far, in the order in which they came."""

    def __init__(self, inputs: list[Any], known: list[GroupEstimate]) -> None:
        self._inputs = inputs
        self._known: dict[Group, GroupEstimate] = {}
        for estimate in known:
            self.add(estimate)

    def inputs(self) -> list[Any]:
        return self._inputs

    def add(self, estimate: GroupEstimate) -> None:
        self._known.setdefault(estimate.members, estimate)

    def get(self, members: Group) -> GroupEstimate | None:
        return self._known.get(members)

    def since(self, count: int) -> list[GroupEstimate]:
        return list(self._known.values())[count:]


class _SharedCache(dict[Group, GroupEstimate]):
    """The dictionary in front of the actor. A group missed by both is fitted here and told there."""

    def __init__(self, shared: Any) -> None:
        super().__init__()
        self._shared = shared
        self._pulled = 0

    def get(self, members: Group, default: Any = None) -> Any:
        if members not in self:
            found = ray.get(self._shared.get.remote(members))
            if found is None:
                return default
            super().__setitem__(members, found)
        return self[members]

    def __setitem__(self, members: Group, estimate: GroupEstimate) -> None:
        super().__setitem__(members, estimate)
        self._shared.add.remote(estimate)

    def pull(self) -> None:
        """Take over what others fitted; calls of one process are served in order, so all that it told has arrived."""
        new = ray.get(self._shared.since.remote(self._pulled))
        self._pulled += len(new)
        for estimate in new:
            super().__setitem__(estimate.members, estimate)


class _Trial(tune.Trainable):  # type: ignore[misc]
    """One trial of the search, in an actor that serves many."""

    def setup(self, config: dict[str, Any], shared: Any) -> None:
        self._inputs: _Inputs = ray.get(ray.get(shared.inputs.remote())[0])
        self._cache = _SharedCache(shared)
        inputs = self._inputs
        self._estimator = Estimator(inputs.features, inputs.training, inputs.regularization, self._cache)
        self._case = config["case"]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._case = new_config["case"]
        return True

    def step(self) -> dict[str, Any]:
        started, fits = time.perf_counter(), self._estimator.fits
        self._cache.pull()
        with threadpool_limits(limits=1):
            result = run_case(self._case, self._estimator, self._inputs.similarity, self._inputs.search)
        self._cache.pull()
        seconds = time.perf_counter() - started
        spent = {"seconds": seconds, "fits": self._estimator.fits - fits, "peak_memory_bytes": _peak_memory_bytes()}
        return {**result, **spent, "done": True}


def run_search(
    features: Sequence[TaskFeatures],
    config: JobConfig,
    folder: Path,
    progress: Progress | None = None,
    concurrency: int | None = None,
    truths: Sequence[Truth] = (),
) -> SearchResult:
    """Find the groups: writes `affinity.json`, `partition.json` and `search/` into `folder`. Ray must be initialised.

    `progress(done, total)` is called after every trial; `concurrency` bounds the trials that run at once (each has
    one CPU); λ is chosen by `truths`, if there are any. A search of the same inputs that was stopped goes on; one of other
    inputs is replaced.
    `result.best_result` tells which trial wins. Settings that do not fit the tasks are an `InputError`; failed trials, and
    a cluster that places none in time, a `RunError`.
    """
    started = time.perf_counter()
    cases = search_cases(config.search, len(features))
    scales = list(dict.fromkeys(config.search.regularization_scales))
    total, found = len(scales) * len(cases), []
    for place, scale in enumerate(scales):
        path = folder / "search" / (f"scale-{scale:g}" if len(scales) > 1 else "")

        def on_trial(done: int, trials: int, before: int = place * len(cases)) -> None:
            if progress is not None:
                progress(before + done, total)

        found.append(_search_at(scale, cases, features, config, folder, path, on_trial, concurrency, truths))
    # The first of equals, so that nothing depends on more than the order of the scales.
    best = min((result for result, _ in found), key=lambda result: round(result.search_objective, 9))
    best = replace(
        best,
        trials=sum(result.trials for result, _ in found),
        fits=sum(result.fits for result, _ in found),
        flops=sum(result.flops for result, _ in found),
    )
    write_json(folder / "affinity.json", best.affinity.to_json())
    write_json(folder / "partition.json", best.to_json())
    rows = [row for _, table in found for row in table]
    write_text(folder / "search" / "trials.csv", pandas.DataFrame(rows).to_csv(index=False))
    peak = max(_peak_memory_bytes(), *(int(row["peak_memory_bytes"]) for row in rows))
    return replace(best, seconds=time.perf_counter() - started, peak_memory_bytes=peak)


def _search_at(
    scale: float,
    cases: list[dict[str, Any]],
    features: Sequence[TaskFeatures],
    config: JobConfig,
    folder: Path,
    path: Path,
    progress: Progress,
    concurrency: int | None,
    truths: Sequence[Truth],
) -> tuple[SearchResult, list[dict[str, Any]]]:
    """The search at one multiple of λ, kept under `path`; what it found, and Tune's table."""
    with threadpool_limits(limits=1):  # the same bits on any number of cores
        fits = FitLog(path / "fits.jsonl", fingerprint(features, config, truths))
        if fits.reference is None:
            shutil.rmtree(path, ignore_errors=True)
        seed, metric = config.estimator.seed, config.search.objective
        subsets = job_subsets(features, config.estimator)
        reference = fits.reference or _scaled(_reference(features, config, subsets, truths), scale)
        fits.start(reference)
        cache: MutableMapping[Group, GroupEstimate] = dict(fits.known)
        estimator = Estimator(features, config.training, reference.regularization, cache, fit_device())
        nearness = gradient_similarity(features) if len(features) > COVER_TASKS else None
        similarity = affinity(estimator, subsets, metric, seed, nearness)
        write_json(folder / "affinity.json", similarity.to_json())
        for references in ([range(len(features))], [[task] for task in range(len(features))]):
            estimator.objective(references)  # everything together, and each alone, are told beside the result
        fits.add(cache.values())

        inputs = _Inputs(
            estimator.features, config.training, reference.regularization, config.search, similarity.symmetric()
        )
        table = _run_trials(inputs, cases, path, fits, progress=progress, concurrency=concurrency)
        cache.update(fits.known)
        return best_result(table, estimator, similarity, fits, config.search), table


def _scaled(reference: Reference, scale: float) -> Reference:
    return replace(reference, regularization=reference.regularization * scale)


def _peak_memory_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def job_estimator(features: Sequence[TaskFeatures], config: JobConfig, truths: Sequence[Truth] = ()) -> Estimator:
    """The estimator that a search of this job uses, with its λ_ref, and nothing fitted yet.

    Where `search.regularization_scales` has one multiple of λ_ref, that is what the search uses; of several none is the search's
    beforehand, and λ_ref itself is taken.
    """
    scales = set(config.search.regularization_scales)
    scale = next(iter(scales)) if len(scales) == 1 else 1.0
    subsets = job_subsets(features, config.estimator)
    with threadpool_limits(limits=1):
        reference = _reference(features, config, subsets, truths)
        return Estimator(features, config.training, scale * reference.regularization, device=fit_device())


def fit_device() -> str | None:
    """Where this process fits many groups at once: on a GPU that it sees, else nowhere, but one after another in numpy.

    Only the process that runs the search asks: trials are given no GPU by Ray, and need a few fits at a time.
    """
    import torch

    return "cuda" if torch.cuda.is_available() else None


def _reference(
    features: Sequence[TaskFeatures], config: JobConfig, subsets: Sequence[Group], truths: Sequence[Truth]
) -> Reference:
    setting = config.estimator.regularization
    if setting != "auto":
        return Reference(setting, 0)
    if truths:
        choice = calibrate_regularization(features, config.training, truths)
        return Reference(choice.value, choice.flops)
    choice = choose_regularization(features, config.training, subsets, config.estimator.seed)
    return Reference(choice.value, choice.flops)


@dataclass
class _Listener:
    """What `_OnTrial` tells, and how long no trial may run before the search gives up."""

    on_trial: Callable[[int], None]
    wait_minutes: float
    since: float | None = None  # when no trial was running first
    failed: OSError | None = None  # what could not be written after a trial

    def tell(self, done: int) -> None:
        """Call `on_trial`; Tune would take its failure for the trial's, so that it waits for `check`."""
        try:
            self.on_trial(done)
        except OSError as error:
            self.failed = error

    def check(self, running: bool) -> None:
        """Raise what could not be written, or `RunError` if the cluster has let all trials wait for too long."""
        if self.failed is not None:
            raise self.failed
        if running:
            self.since = None
            return
        now = time.monotonic()
        self.since = now if self.since is None else self.since
        if now - self.since > 60.0 * self.wait_minutes:
            raise RunError(
                f"the cluster placed no trial in {self.wait_minutes:g} minutes (search.wait_minutes): {shortfall([_TRIAL])}"
            )


class _OnTrial(tune.Callback):  # type: ignore[misc]
    """After every trial: save the new fits and tell the progress. Before every step: look whether the cluster places any.

    Tune pickles its callbacks with the experiment and unpickles them when it goes on, so that this one holds nothing;
    what to call is looked up by the experiment's path.
    """

    listeners: ClassVar[dict[str, _Listener]] = {}

    def __init__(self, experiment: str) -> None:
        self._experiment = experiment

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        listener = self.listeners.get(self._experiment)
        if listener is not None:
            listener.check(any(trial.status == "RUNNING" for trial in trials))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        listener = self.listeners.get(self._experiment)
        if listener is not None:
            # Tune calls before it marks the trial itself as finished.
            listener.tell(sum(1 for other in trials if other is trial or other.is_finished()))


def _run_trials(
    inputs: _Inputs,
    cases: list[dict[str, Any]],
    path: Path,
    fits: FitLog,
    *,
    progress: Progress | None,
    concurrency: int | None,
) -> list[dict[str, Any]]:
    """Run or go on with the Tune experiment under `path`; returns Tune's table, a row per trial, sorted."""
    # Beside this process: a node that may be taken away must not hold what all trials need. Ray takes a soft affinity for a hint.
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    # All its calls may be repeated.
    actor = ray.remote(num_cpus=0, label_selector=here, max_task_retries=TRIAL_RETRIES)(_Shared)
    shared = actor.remote([ray.put(inputs)], list(fits.known.values()))
    pulled = len(fits.known)
    experiment = str(path.resolve() / "tune")

    def on_trial(done: int) -> None:
        nonlocal pulled
        new = ray.get(shared.since.remote(pulled))
        pulled += len(new)
        fits.add(new)
        if progress is not None:
            progress(done, len(cases))

    _OnTrial.listeners[experiment] = _Listener(on_trial, inputs.search.wait_minutes)
    try:
        rows = _fit(lambda: _tuner(shared, cases, experiment, concurrency), len(cases), Path(experiment))
        on_trial(len(cases))
    except ray.exceptions.RayActorError as error:  # a trial's own death is Tune's business
        raise RunError(f"the actor that the search's trials share died: {error}; the same command goes on") from error
    finally:
        del _OnTrial.listeners[experiment]
        ray.kill(shared)
    return rows


def _fit(tuner: Callable[[], Any], trials: int, experiment: Path) -> list[dict[str, Any]]:
    """Run or go on with an experiment until every trial has a result: Tune's table, sorted.

    Raises:
        RunError: trials failed, or left no result however often they were tried.
        OSError: the disk is full.
    """
    for left in reversed(range(TRIAL_RETRIES + 1)):
        # Tune's handler of Ctrl-C would stay after the search and swallow one that is meant for what comes later.
        with _environment(RAY_AIR_NEW_OUTPUT="0", TUNE_GLOBAL_CHECKPOINT_S="1", TUNE_DISABLE_SIGINT_HANDLER="1"):
            results = tuner().fit()
        errors = results.errors
        if any(os.strerror(errno.ENOSPC) in str(error) for error in errors):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(experiment))
        if errors:
            # Two calls of an actor that fail at once are more than Tune forgives a trial.
            if left and all(isinstance(error, ray.exceptions.RayActorError) for error in errors):
                continue
            raise RunError(f"{len(errors)} of {trials} search trials failed; the first: {errors[0]}")
        table = results.get_dataframe().reindex(columns=COLUMNS).dropna(subset=["objective"])
        if len(table) == trials:
            rows: list[dict[str, Any]] = table.sort_values(["m", "method", "seed"]).to_dict("records")
            return rows
        shutil.rmtree(experiment)  # a full disk took results of trials that Tune counts as done; their fits are kept
    raise RunError(f"the search ended with {len(table)} trials of {trials}; the same command tries again")


def _tuner(shared: Any, cases: list[dict[str, Any]], experiment: str, concurrency: int | None) -> Any:
    """A tuner for the experiment: restored where it was stopped, fresh otherwise."""
    trainable = tune.with_resources(tune.with_parameters(_Trial, shared=shared), _TRIAL)
    space = {"case": tune.grid_search(cases)}
    folder = Path(experiment)
    # A kill before Tune's first snapshot leaves a tuner without trials.
    if tune.Tuner.can_restore(experiment) and any(folder.glob("experiment_state*.json")):
        return tune.Tuner.restore(experiment, trainable, param_space=space, restart_errored=True)
    shutil.rmtree(folder, ignore_errors=True)
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            reuse_actors=True,
            max_concurrent_trials=concurrency,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            callbacks=[_OnTrial(experiment)],
            failure_config=tune.FailureConfig(max_failures=TRIAL_RETRIES),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )


def _trial_name(trial: Any) -> str:
    case = trial.config["case"]
    groups = "free" if case["m"] is None else f"{case['m']:03d}"
    return f"{groups}-{case['method']}-{case['seed']}"


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set variables for Tune, which reads them from the environment alone."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
