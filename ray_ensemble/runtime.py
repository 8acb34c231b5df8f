"""Ray at the edge: joining or starting a cluster, and a pool of actors that is fed unit by unit."""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from ray_ensemble.errors import InputError, RunError

# Train's controller polls every 2 s and holds up each report() until it does; the watcher and the metrics cost a process
# each. All of these are read when a library is imported, hence here, before any import, and handed on to Ray's workers.
_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",  # the libraries' own bars, which do not know when they are in a log
}
_HANDED_ON = ("RAY_ENSEMBLE_CACHE", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_OFFLINE")
_OBJECT_STORE = 400 * 2**20
_MAX_RESTARTS = 3  # of one actor, and tries of one unit, before the run gives up

Unit = TypeVar("Unit")


def prepare_environment() -> None:
    """Set what Ray reads when it is imported; what the user has set stays."""
    for key, value in _SETTINGS.items():
        os.environ.setdefault(key, value)


@contextmanager
def ray_session() -> Iterator[None]:
    """A Ray cluster for the length of a run: the one of this process, the one at RAY_ADDRESS, or a local one.

    A local one binds its dashboard to loopback. A cluster that was there before stays when the run ends.
    """
    prepare_environment()
    import ray

    if ray.is_initialized():
        yield
        return
    environment = {key: os.environ[key] for key in (*_SETTINGS, *_HANDED_ON) if key in os.environ}
    options: dict[str, Any] = {
        "runtime_env": {"env_vars": environment},
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    if not os.environ.get("RAY_ADDRESS"):
        # Train's clean-up of a dead controller asks the dashboard, so the dashboard has to run.
        options |= {"include_dashboard": True, "dashboard_host": "127.0.0.1", "object_store_memory": _OBJECT_STORE}
    _start(options)
    try:
        yield
    finally:
        ray.shutdown()


def _start(options: dict[str, Any]) -> None:
    import ray

    address = os.environ.get("RAY_ADDRESS")
    for attempt in (1, 2):
        try:
            ray.init(**options)
            return
        except ConnectionError as error:
            raise InputError(f"RAY_ADDRESS={address}: no Ray cluster answers ({error})") from None
        except Exception as error:  # Ray raises the bare class when its processes take more than 30 s to start
            ray.shutdown()
            if "timed out during startup" not in str(error) or attempt == 2:
                raise RunError(f"Ray did not start on this machine: {error}") from error
            print("Ray is slow to start on this busy machine; trying once more", flush=True)


def cluster_cpus() -> int:
    """CPUs of the whole cluster, at least one."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def cluster_gpus() -> int:
    """GPUs of the whole cluster."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def pool_size(wanted: Literal["auto"] | int, threads: int, units: int) -> int:
    """How many actors to start: as many as asked for, or one a GPU, or one per `threads` CPUs; never more than units."""
    if wanted != "auto":
        return max(1, min(wanted, units))
    gpus = cluster_gpus()
    return max(1, min(gpus or cluster_cpus() // threads, units))


def map_units(
    actor_class: type,
    arguments: tuple[Any, ...],
    method: str,
    units: Mapping[str, Unit],
    *,
    actors: int,
    threads: int,
    on_result: Callable[[str, Any], None],
) -> None:
    """Run `actor.method(unit)` for every unit on a pool of actors, handing the next unit to whichever is free.

    An actor that dies is restarted and its unit given out again, a bounded number of times; finished units stay finished.

    Args:
        actor_class: a plain class; it becomes a Ray actor with `threads` CPUs, and a GPU where the cluster has any.
        arguments: of its constructor; large ones should be small descriptions that each actor loads for itself.
        method: the method's name; it takes one unit.
        units: name -> unit; names stand in errors.
        actors: size of the pool.
        threads: CPUs of an actor.
        on_result: called in this process with (name, result), in order of completion.

    Raises:
        InputError: raised by the method itself.
        RunError: the method failed, or its actor died too often; the unit is named.
    """
    import ray

    if not units:
        return
    gpu = min(1.0, cluster_gpus() / actors) if cluster_gpus() else 0
    remote = ray.remote(num_cpus=threads, num_gpus=gpu, max_restarts=_MAX_RESTARTS, max_task_retries=_MAX_RESTARTS)(
        actor_class
    )
    pool = [remote.remote(*arguments) for _ in range(actors)]
    try:
        waiting = iter(units.items())
        running: dict[Any, tuple[str, Any]] = {}

        def hand_out(actor: Any) -> None:
            for name, unit in _next(waiting):
                running[getattr(actor, method).remote(unit)] = (name, actor)

        for actor in pool:
            hand_out(actor)
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            name, actor = running.pop(ready)
            on_result(name, _result(ready, name))
            hand_out(actor)
    finally:
        for actor in pool:
            ray.kill(actor)


def _next(iterator: Iterator[tuple[str, Unit]]) -> Iterable[tuple[str, Unit]]:
    item = next(iterator, None)
    return [] if item is None else [item]


def _result(reference: Any, name: str) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise InputError(str(error.cause)) from None
        raise RunError(f"{name}: {type(error.cause).__name__}: {error.cause}") from error
    except ray.exceptions.RayActorError as error:
        raise RunError(
            f"{name}: its worker died {_MAX_RESTARTS + 1} times (out of memory, or killed); the same command goes on from here"
        ) from error


def peak_memory_bytes() -> int:
    """The most memory that this process has held: on its GPU if it has one, else its resident set."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
