"""A simulation of a run's stages on many GPUs: pure functions of measured costs and assumed speeds. No Ray, no files.

Stages come one after another, as in the package. In each the driver works alone for a while, units of work go to actors that load
a base first and come back through the one driver (`pool_seconds`), or whole training jobs share the GPUs (`jobs_seconds`).
Every second that a stage does not use the GPUs for is lost to all of them.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ray_ensemble.training.packing import shared_workers

UNIT = 32  # examples of a unit of the gradient pass
CPUS = 8  # of a GPU's node


@dataclass(frozen=True)
class Base:
    """What is assumed of a base on one GPU: tokens a second of a forward pass, seconds to load it, and its adapters' MB."""

    forward_tokens: float
    load: float
    adapter_mb: float


# A forward pass is 2·N operations a token: 120 TFLOP/s sustained give 60,000 and 7,500 tokens a second. Rank 4 on q, k, v, fp32.
BASES = {"1B": Base(60_000.0, 10.0, 2.4), "8B": Base(7_500.0, 60.0, 9.4)}


@dataclass(frozen=True)
class Job:
    """A run: n datasets of equal size, m groups of equal size (√n by default), default settings else.

    `used` is how many adapters a dataset's weights leave; `workers` is `training.workers`, 0 for `auto`.
    """

    tasks: int
    train: int = 1000
    validation: int = 200
    test: int = 200
    tokens: int = 150
    dim: int = 400
    epochs: int = 2
    batch: int = 8
    min_steps: int = 200
    trials: int = 32
    used: int = 3
    workers: int = 1
    groups: int = 0

    @property
    def m(self) -> int:
        """Number of groups."""
        return self.groups or max(2, math.ceil(math.sqrt(self.tasks)))


@dataclass(frozen=True)
class Line:
    """Seconds = fixed + slope · size."""

    fixed: float
    slope: float = 0.0

    def at(self, size: float) -> float:
        """Seconds at a size."""
        return self.fixed + self.slope * size


@dataclass(frozen=True)
class Power:
    """Seconds that grow as a power of n, through the last two measured points; straight between those before."""

    n: tuple[float, ...]
    seconds: tuple[float, ...]

    def at(self, n: float) -> float:
        """Seconds at n."""
        if n <= self.n[-1]:
            return float(np.interp(n, self.n, self.seconds))
        (n1, n2), (s1, s2) = self.n[-2:], self.seconds[-2:]
        if not s1:
            return s2
        return float(s2 * (n / n2) ** max(0.0, math.log(s2 / s1) / math.log(n2 / n1)))


@dataclass(frozen=True)
class Costs:
    """Seconds of everything but the model's arithmetic.

    Args:
        handed: of this process for a unit handed out and taken, by MB of its result.
        saved: to keep a result as a file, by MB.
        waiting: more seconds for each event and each actor that is waited for.
        planned, checked, assembled, hashed: an example, a unit, a unit, a MB of the gradient store.
        request, request_task, request_mb: keys and checks of label scores: of a request, a task, and a MB of all adapters.
        request_by_mb: as it was before: of a MB of its adapter for each request.
        weights: of a dataset, by m.
        merged: by MB of the adapters that go in.
        summarised: of a dataset's figures.
        regularization, affinity, trial: of the search, by n.
        tuned: what Ray Tune adds, by trials.
        actor, job: starts of an actor and of a Ray Train job.
        gradient, training: passes in forward passes.
    """

    handed: Line
    saved: Line
    waiting: float
    planned: float
    checked: float
    assembled: float
    hashed: float
    request: float
    request_task: float
    request_mb: float
    request_by_mb: float
    weights: Power
    merged: Line
    summarised: float
    regularization: Power
    affinity: Power
    trial: Power
    tuned: Line
    actor: float
    job: float
    gradient: float
    training: float = 2.0

    @classmethod
    def of(cls, measured: dict[str, Any], before: bool = False) -> Costs:
        """From the figures of `scaling_measure`; `before` the hashes of label scores were made once for all requests."""
        pool, store, fits, score = measured["pool"], measured["store"], measured["fits"], measured["requests"]
        requests = {
            "now": (score["request"], score["task"], score["adapter_MB"], 0.0),
            "before": (score["before"]["request"], 0.0, 0.0, score["before"]["request_MB"]),
        }
        waits = {int(count): seconds for count, seconds in pool["one_wait_among"].items()}
        n = tuple(map(float, fits["n"]))
        return cls(
            handed=_line(pool["handed_out_and_taken"]),
            saved=_line(pool["saved"]),
            waiting=max(0.0, (waits[256] - waits[1]) / 255),
            planned=store["planned_example"],
            checked=store["checked_unit"],
            assembled=store["assembled_unit"],
            hashed=store["hashed_MB"],
            request=requests["before" if before else "now"][0],
            request_task=requests["before" if before else "now"][1],
            request_mb=requests["before" if before else "now"][2],
            request_by_mb=requests["before" if before else "now"][3],
            weights=Power(tuple(map(float, measured["weights"]["m"])), tuple(measured["weights"]["seconds"])),
            merged=_line(measured["merging"]),
            summarised=measured["evaluation"]["slope"],
            regularization=Power(n, tuple(fits["regularization"])),
            affinity=Power(n, tuple(fits["affinity"])),
            trial=Power(n, tuple(fits["trial"])),
            tuned=_line(measured["tune_trial"]),
            actor=measured["actor_start"]["seconds"],
            job=measured["train_job"]["seconds"],
            gradient=measured["speed"]["gradient_over_forward"],
        )


def _line(found: dict[str, float]) -> Line:
    return Line(found["fixed"], found["slope"])


_NO_TIME = Power((1.0, 2.0), (0.0, 0.0))
# No overhead but the loading of bases; the gradient pass is 1.04 times a forward and backward pass (docs/gradients.md).
NO_OVERHEAD = Costs(
    handed=Line(0.0), saved=Line(0.0), waiting=0.0, planned=0.0, checked=0.0, assembled=0.0, hashed=0.0, request=0.0,
    request_task=0.0, request_mb=0.0, request_by_mb=0.0, weights=_NO_TIME, merged=Line(0.0), summarised=0.0,
    regularization=_NO_TIME, affinity=_NO_TIME, trial=_NO_TIME, tuned=Line(0.0), actor=0.0, job=0.0, gradient=2.08,
)  # fmt: skip


# Schedules ------------------------------------------------------------------------------------------------------------------


def pool_seconds(units: Sequence[float], actors: int, start: float, handling: float) -> float:
    """Seconds until a pool has done all units: actors are ready after `start`, and each result takes the one driver `handling`
    seconds, in the order of completion, before its actor gets the next unit.
    """
    if not units:
        return 0.0
    waiting = iter(units)
    done = [(start + unit, place) for place, unit in zip(range(actors), waiting, strict=False)]
    heapq.heapify(done)
    driver = 0.0
    while done:
        ready, place = heapq.heappop(done)
        driver = max(driver, ready) + handling
        unit = next(waiting, None)
        if unit is not None:
            heapq.heappush(done, (driver + unit, place))
    return driver


def jobs_seconds(jobs: Sequence[tuple[float, int]], gpus: int) -> float:
    """Seconds until all jobs (seconds, GPUs) are done: in their order, each as soon as it fits; one that asks for more than
    there is gets all, and takes its share longer.
    """
    queue = [(seconds * max(1.0, wanted / gpus), min(wanted, gpus)) for seconds, wanted in jobs]
    running: list[tuple[float, int]] = []
    free, now = gpus, 0.0
    while queue or running:
        for job in list(queue):
            if job[1] <= free:
                queue.remove(job)
                free -= job[1]
                heapq.heappush(running, (now + job[0], job[1]))
            if not free:
                break
        now, held = heapq.heappop(running)
        free += held
    return now


# Stages -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One stage: GPU seconds of work, seconds by the clock, and seconds lost to each cause."""

    name: str
    work: float
    seconds: float
    causes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A simulated run: its stages, and the GPUs."""

    stages: tuple[Stage, ...]
    gpus: int

    @property
    def seconds(self) -> float:
        """By the clock."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def efficiency(self) -> float:
        """GPU seconds of work over GPU seconds held."""
        return sum(stage.work for stage in self.stages) / (self.gpus * self.seconds)

    @property
    def limit(self) -> str:
        """The stage that loses most GPU seconds, and what loses most of them there."""
        stage = max(self.stages, key=lambda stage: self.gpus * stage.seconds - stage.work)
        return f"{stage.name}: {max(stage.causes, key=lambda cause: stage.causes[cause])}"

    def described(self) -> dict[str, Any]:
        """As plain figures."""
        stages = {s.name: {"work": s.work, "seconds": s.seconds, "causes": s.causes} for s in self.stages}
        return {"efficiency": self.efficiency, "limit": self.limit, "seconds": self.seconds, "stages": stages}


def simulate(job: Job, base: Base, gpus: int, costs: Costs) -> Cell:
    """A run of `job` on so many GPUs."""
    stages = (
        gradients(job, base, gpus, costs),
        search(job, gpus, costs),
        train(job, base, gpus, costs),
        ensemble(job, base, gpus, costs),
        evaluate(job, base, gpus, costs),
    )
    return Cell(stages, gpus)


def _pooled(
    name: str, units: Sequence[float], gpus: int, base: Base, costs: Costs, handling: float, serial: float
) -> Stage:
    """A stage of a pool, with what the driver does alone before and after."""
    actors = min(gpus, len(units))
    start = costs.actor + base.load
    each = handling + costs.waiting * actors
    whole = pool_seconds(units, actors, start, each)
    unhandled = pool_seconds(units, actors, start, 0.0)
    work = sum(units)
    causes = {
        "driver alone": serial,
        "driver, unit by unit": whole - unhandled,
        "start": start,
        "last units": unhandled - start - work / gpus,
    }
    return Stage(name, work, serial + whole, causes)


def gradients(job: Job, base: Base, gpus: int, costs: Costs) -> Stage:
    """The gradient pass."""
    seconds = job.tokens / base.forward_tokens * costs.gradient
    units: list[float] = []
    for examples in (job.train, job.validation):
        full, rest = divmod(examples, UNIT)
        units += ([UNIT * seconds] * full + ([rest * seconds] if rest else [])) * job.tasks
    mb = UNIT * job.dim * 4 / 2**20
    kept = job.tasks * (job.train + job.validation) * job.dim * 4 / 2**20
    # Hashes of the store: when it is written, in the manifest, and when the search reads it.
    serial = (
        costs.planned * job.tasks * (job.train + job.validation)
        + costs.assembled * len(units)
        + 3 * costs.hashed * kept
    )
    return _pooled("gradients", units, gpus, base, costs, costs.handed.at(mb) + costs.saved.at(mb), serial)


def search(job: Job, gpus: int, costs: Costs) -> Stage:
    """The search; it uses the nodes' CPUs and no GPU."""
    alone = costs.regularization.at(job.tasks) + costs.affinity.at(job.tasks)
    rounds = math.ceil(job.trials / min(job.trials, CPUS * gpus))
    trials = rounds * costs.trial.at(job.tasks)
    tuned = costs.tuned.at(job.trials)
    return Stage("search", 0.0, alone + trials + tuned, {"driver alone": alone, "trials": trials, "Ray Tune": tuned})


def train(job: Job, base: Base, gpus: int, costs: Costs) -> Stage:
    """Groups and the baseline, which gets the steps of all of them; data parallel over up to `workers` GPUs by its steps."""
    group = max(job.min_steps, math.ceil(job.epochs * job.train * job.tasks / job.m / job.batch))
    step = job.batch * job.tokens / base.forward_tokens * costs.training
    start = costs.job + base.load
    steps = [group * job.m, *[group] * job.m]
    if job.workers:
        workers = [max(1, round(job.workers * each / steps[0])) for each in steps]
    else:
        workers = shared_workers(steps, gpus, job.batch)
    jobs = [(start + each * step / count, count) for each, count in zip(steps, workers, strict=True)]
    whole = jobs_seconds(jobs, gpus)
    work = sum(steps) * step
    longest = jobs_seconds(jobs[:1], gpus)
    causes = {"start": start * sum(workers) / gpus, "longest job": max(0.0, longest - start - work / gpus)}
    causes["order"] = max(0.0, whole - work / gpus - sum(causes.values()))
    return Stage("train", work, whole, causes)


def _requests(job: Job, base: Base, costs: Costs, each: int, adapters: int) -> float:
    """Seconds that this process takes for `each` requests of every dataset."""
    count = job.tasks * each
    shared = costs.request_task * job.tasks + costs.request_mb * adapters * base.adapter_mb
    return count * (costs.request + costs.request_by_mb * base.adapter_mb) + shared


def ensemble(job: Job, base: Base, gpus: int, costs: Costs) -> Stage:
    """Every adapter on half of every dataset's validation examples; then weights and merges, one dataset after another."""
    count = job.tasks * job.m
    units = [job.validation / 2 * job.tokens / base.forward_tokens] * count
    serial = _requests(job, base, costs, job.m, job.m) + job.tasks * (
        costs.weights.at(job.m) + costs.merged.at(job.used * base.adapter_mb)
    )
    return _pooled("ensemble", units, gpus, base, costs, costs.handed.fixed + costs.saved.fixed, serial)


def evaluate(job: Job, base: Base, gpus: int, costs: Costs) -> Stage:
    """Base, baseline, the adapters in use, and the merged one, on every dataset's test examples; then the figures."""
    count = job.tasks * (3 + job.used)
    units = [job.test * job.tokens / base.forward_tokens] * count
    adapters = job.m + 1 + job.tasks  # the merged ones are each dataset's own
    serial = _requests(job, base, costs, 3 + job.used, adapters) + job.tasks * costs.summarised
    return _pooled("evaluate", units, gpus, base, costs, costs.handed.fixed + costs.saved.fixed, serial)
