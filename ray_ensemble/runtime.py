"""Ray at the edge: joining or starting a cluster, and what it holds."""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from ray_ensemble.errors import InputError, RunError

# Train's controller polls every 2 s and holds up each report() until it does; the metrics cost a process.
# All of these are read when a library is imported, hence here, before any import, and handed on to Ray's workers.
_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",  # the libraries' own bars, which do not know when they are in a log
}
_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
_HANDED_ON = (
    "RAY_ENSEMBLE_CACHE",
    "XDG_CACHE_HOME",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)
_OBJECT_STORE = 400 * 2**20
MARKET_TYPE = "ray.io/market-type"  # the label by which a cluster tells its spot nodes from the others


def prepare_environment() -> None:
    """Set what Ray reads when it is imported; what the user has set stays."""
    for key, value in _SETTINGS.items():
        os.environ.setdefault(key, value)


@contextmanager
def ray_session(metadata: Mapping[str, str] | None = None) -> Iterator[None]:
    """A Ray cluster for the length of a run: the one of this process, the one at RAY_ADDRESS, or a local one.

    A local one binds its dashboard to loopback. A cluster that was there before stays when the run ends. `metadata` are shown
    by the dashboard, unless this process joined Ray before.

    Raises:
        InputError: no cluster answers at RAY_ADDRESS, or this process is on a spot node of it.
        RunError: Ray did not start on this machine.
    """
    prepare_environment()
    import ray

    if ray.is_initialized():
        yield
        return
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault(_WATCHER, "0")
    environment = handed_on()
    options: dict[str, Any] = {
        "runtime_env": {"env_vars": environment},
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "job_config": ray.job_config.JobConfig(metadata=dict(metadata or {})),
    }
    if not os.environ.get("RAY_ADDRESS"):
        # Train's clean-up of a dead controller asks the dashboard, so the dashboard has to run.
        # "local", or Ray would join whatever cluster was started on this machine last.
        options |= {
            "address": "local",
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "object_store_memory": _OBJECT_STORE,
        }
    _start(options)
    try:
        if os.environ.get("RAY_ADDRESS"):
            _refuse_spot_node()
        yield
    finally:
        ray.shutdown()


def handed_on() -> dict[str, str]:
    """The variables of this process that workers are given. Ray shows them to whoever can list jobs.

    Raises:
        InputError: one of them is an address with a user or password.
    """
    found = {key: os.environ[key] for key in (*_SETTINGS, _WATCHER, *_HANDED_ON) if key in os.environ}
    for key, value in found.items():
        if "://" in value and "@" in value:
            raise InputError(f"{key}: holds a user or password; give the address alone")
    return found


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


def _refuse_spot_node() -> None:
    """Raise `InputError` where this process is on a node that may be taken away: the run would go with it.

    What coordinates a run sits with it: Tune runs in this process, and Ray Train pins its controllers and barriers to this node.
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    labels: dict[str, str] = next((node["Labels"] for node in ray.nodes() if node["NodeID"] == here), {})
    if labels.get(MARKET_TYPE) == "spot":
        raise InputError(
            f"this process is on a spot node ({MARKET_TYPE}=spot), and the whole run would go when it goes: start it on the "
            "head or on an on-demand node, as `ray-ensemble submit` does"
        )


def release_orphaned_groups(actor: str | None = None) -> int:
    """Remove placement groups that actors of this job left behind: those of dead actors, and all of `actor` (an id in hex).

    Ray keeps a group until its maker and the whole job are dead. A Ray Train controller that dies, or that cannot set up its
    workers' process group, therefore leaves its resources held until the driver ends. Groups of living actors, of the driver,
    and of other jobs on the cluster stay. Returns how many were removed.
    """
    import ray
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    job, maker = (bytes.fromhex(identity or "") for identity in (ray.get_runtime_context().get_job_id(), actor))
    found = 0
    for written in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(written)
        if group.creator_job_id != job or group.state == PlacementGroupTableData.REMOVED:
            continue
        if group.creator_actor_dead or (maker and group.creator_actor_id == maker):
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
            found += 1
    return found


def living_controllers() -> set[str]:
    """Ids in hex of the controllers of this job's Ray Train runs."""
    import ray
    from ray._private.state import actors

    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    return {
        identity
        for identity, actor in actors(job_id=job).items()
        if actor["ActorClassName"] == "TrainController" and actor["State"] != "DEAD"
    }


def kill_controllers(identities: Iterable[str]) -> None:
    """End Ray Train runs of this process by their controllers' ids; their workers go with them.

    `fit` keeps the handle to itself and lets only the main thread's Ctrl-C abort a run.
    """
    import ray
    from ray._private.worker import global_worker
    from ray.exceptions import ActorHandleNotFoundError

    for identity in identities:
        with suppress(ActorHandleNotFoundError):  # its run has just ended
            global_worker.core_worker.kill_actor(ray.ActorID.from_hex(identity), True)


def watches_preemption() -> bool:
    """Whether Ray Train looks out for nodes that are about to be taken away: not in a cluster of this machine's own."""
    return os.environ.get(_WATCHER) != "0"


def cluster_cpus() -> int:
    """CPUs of the whole cluster, at least one."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def cluster_gpus() -> int:
    """GPUs of the whole cluster."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def node_resources() -> list[dict[str, float]]:
    """What each living node of the cluster has."""
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def may_grow() -> bool:
    """Whether the cluster may get more nodes: one that was joined may, one of this machine's own does not."""
    return watches_preemption()


def shortfall(bundles: Sequence[Mapping[str, float]]) -> str:
    """What is asked for, each bundle on one node, and what the cluster has and has free now."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    free = ray.available_resources()
    keys = ("CPU", "GPU")
    asked = _amounts({key: bundles[0].get(key, 0.0) for key in keys})
    most = _amounts({key: max((node.get(key, 0.0) for node in nodes), default=0.0) for key in keys})
    whole = _amounts({key: sum(node.get(key, 0.0) for node in nodes) for key in keys})
    return (
        f"{len(bundles)} × {asked} asked for, each on one node; the cluster has {len(nodes)} nodes with {most} at most and "
        f"{whole} in all, of which {_amounts({key: free.get(key, 0.0) for key in keys})} are free"
    )


def _amounts(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {key}s" for key, amount in resources.items())


def peak_memory_bytes() -> int:
    """The most memory that this process has held: on its GPU if it has one, else its resident set."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
