"""A pool of Ray actors that is fed unit by unit, grows to what the cluster gives, and outlives its actors and nodes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from ray_ensemble.config import GradientsConfig, Range
from ray_ensemble.errors import InputError, RunError
from ray_ensemble.metrics import current_figures
from ray_ensemble.runtime import cluster_cpus, cluster_gpus, shortfall

_TRIES = 4  # of one unit whose actors die under it, and actors lost in a row, before the run gives up
_NOTICE_S = 30.0  # without any actor, until the user is told what is waited for
_READY = "(starting)"

Unit = TypeVar("Unit")


@dataclass(frozen=True)
class PoolSize:
    """How many actors to keep: at least `least`, and up to `most` while there is work for them."""

    least: int
    most: int


class ActorKind(Protocol):
    """How actors of a pool are started and given up."""

    @property
    def bundles(self) -> Sequence[Mapping[str, float]]:
        """The resources of one actor, each bundle on one node."""

    @property
    def wait_s(self) -> float:
        """Seconds that the cluster may take to place the first actor."""

    def start(self) -> Any:
        """A new actor's handle, at once; the actor itself may have to wait for resources."""

    def stop(self, actor: Any) -> None:
        """Give an actor and what it holds back to the cluster."""


class PlainActors:
    """Actors of one class, each with `config.threads` CPUs and its GPUs. Their constructor gets `arguments`."""

    def __init__(self, actor_class: type, arguments: tuple[Any, ...], config: GradientsConfig, size: PoolSize) -> None:
        import ray

        bundle = bundle_of(config, size)
        self.bundles: list[dict[str, float]] = [bundle]
        self.wait_s = 60.0 * config.wait_minutes
        # Lost actors are replaced by the pool, on any node, rather than restarted by Ray where they were.
        self._remote = ray.remote(
            num_cpus=bundle["CPU"], num_gpus=bundle.get("GPU", 0), max_restarts=0, max_task_retries=0
        )(actor_class)
        self._arguments = arguments

    def start(self) -> Any:
        """See `ActorKind`."""
        return self._remote.remote(*self._arguments)

    def stop(self, actor: Any) -> None:
        """See `ActorKind`."""
        import ray

        ray.kill(actor)


def pool_size(wanted: Literal["auto"] | int | Range, threads: int, units: int, shards: int = 1) -> PoolSize:
    """How many actors to keep for `units` units: what was asked for, or as many as the cluster now holds; at least one.

    Args:
        wanted: `auto`, a number, or a range that lets an autoscaling cluster grow with the work.
        threads: CPUs of one actor (of each of its shards).
        units: units of work; there are never more actors than units.
        shards: actors that make up one replica.
    """
    if wanted == "auto":
        held = (cluster_gpus() or cluster_cpus() // threads) // shards
        least = most = held
    elif isinstance(wanted, int):
        least = most = wanted
    else:
        least, most = wanted.min, wanted.max
    bounded = [max(1, min(count, units)) for count in (least, most)]
    return PoolSize(*bounded)


def bundle_of(config: GradientsConfig, size: PoolSize) -> dict[str, float]:
    """CPUs and GPUs of one actor, or of each of its shards.

    `gpus: auto` is one GPU where the cluster has any now, and a share of one where unsharded actors outnumber them.
    """
    gpus: float = cluster_gpus()
    if config.gpus != "auto":
        gpus = config.gpus
    elif gpus:
        gpus = 1.0 if config.shards > 1 else min(1.0, gpus / size.least)
    return {"CPU": float(config.threads)} | ({"GPU": gpus} if gpus else {})


@dataclass
class _Member(Generic[Unit]):
    actor: Any
    nodes: tuple[str, ...] = ()  # that it and what it leads are on; known once it is ready
    held: int = 0  # units under way


class _Pool(Generic[Unit]):
    def __init__(
        self,
        kind: ActorKind,
        method: str,
        units: Mapping[str, Unit],
        size: PoolSize,
        on_result: Callable[[str, Any], None],
        in_flight: int,
    ) -> None:
        self._kind, self._method, self._size, self._on_result, self._in_flight = (
            kind,
            method,
            size,
            on_result,
            in_flight,
        )
        self._waiting: deque[tuple[str, Unit]] = deque(units.items())
        self._deaths = dict.fromkeys(units, 0)
        self._lost = 0  # actors since the last result
        self._members: list[_Member[Unit]] = []
        self._running: dict[Any, tuple[_Member[Unit], str, Unit | None]] = {}
        self._handed_out: dict[str, float] = {}  # when, by name of the unit
        self._figures = current_figures()

    def run(self) -> None:
        quiet_since, told = time.monotonic(), False
        while self._waiting or any(name != _READY for _, name, _ in self._running.values()):
            self._grow()
            reference = self._next_event()
            if reference is None:
                waited = time.monotonic() - quiet_since
                if any(member.nodes for member in self._members):
                    continue
                if waited > self._kind.wait_s:
                    raise RunError(
                        f"the cluster placed no actor in {self._kind.wait_s / 60:g} minutes (gradients.wait_minutes): "
                        f"{shortfall(self._kind.bundles)}"
                    )
                if not told and waited > _NOTICE_S:
                    told = True
                    print(f"waiting for the cluster to place an actor: {shortfall(self._kind.bundles)}", flush=True)
                continue
            quiet_since = time.monotonic()
            self._settle(reference)

    def close(self) -> None:
        for member in self._members:
            self._kind.stop(member.actor)
        self._members.clear()

    def _grow(self) -> None:
        """Keep at least `least` actors, and one more for every two waiting units up to `most`."""
        work = len(self._waiting) + sum(member.held for member in self._members)
        wanted = min(work, max(self._size.least, min(self._size.most, len(self._members) + len(self._waiting) // 2)))
        while len(self._members) < wanted:
            member: _Member[Unit] = _Member(self._kind.start())
            self._members.append(member)
            self._running[member.actor.__ray_call__.remote(_nodes)] = (member, _READY, None)

    def _next_event(self) -> Any | None:
        import ray

        ready, _ = ray.wait(list(self._running), num_returns=1, timeout=5.0)
        return ready[0] if ready else None

    def _settle(self, reference: Any) -> None:
        import ray

        member, name, unit = self._running.pop(reference)
        try:
            result = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise InputError(str(error.cause)) from None
            raise RunError(f"{name}: {type(error.cause).__name__}: {error.cause}") from error
        except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
            # A result may go with the node of the actor that made it.
            self._bury(member, name, unit, error)
            return
        if unit is None:
            member.nodes = tuple(result)
        else:
            member.held -= 1
            self._lost = 0
            self._figures.observe("ensemble_unit_seconds", time.monotonic() - self._handed_out.pop(name))
            self._on_result(name, result)
        self._hand_out(member)

    def _hand_out(self, member: _Member[Unit]) -> None:
        while self._waiting and member.held < self._in_flight:
            name, unit = self._waiting.popleft()
            self._running[getattr(member.actor, self._method).remote(unit)] = (member, name, unit)
            self._handed_out[name] = time.monotonic()
            member.held += 1
        if not member.held and not self._waiting:
            # Nothing is left for it: its CPUs and GPUs go back while the others finish.
            self._release(member)

    def _release(self, member: _Member[Unit]) -> None:
        if member in self._members:
            self._members.remove(member)
            self._kind.stop(member.actor)

    def _bury(self, member: _Member[Unit], name: str, unit: Unit | None, error: Any) -> None:
        """Put a dead actor's units back in the queue; the pool grows again by itself."""
        if getattr(error, "actor_init_failed", False):
            reason = str(error).strip().splitlines()[-1]
            prefix = f"{InputError.__module__}.{InputError.__name__}: "
            if reason.startswith(prefix):
                raise InputError(reason.removeprefix(prefix)) from None
            raise RunError(f"an actor could not start: {reason}") from error
        self._release(member)
        # A node that went away takes its actors along: that is the cluster's doing, not the unit's.
        preempted = bool(getattr(error, "preempted", False)) or not _alive(member.nodes)
        self._figures.count("ensemble_preemptions" if preempted else "ensemble_actors_lost")
        at = "while it started" if unit is None else f"with {name}"
        why = "its node went away" if preempted else "out of memory, or killed"
        print(f"an actor was lost {at} ({why}); another takes over", flush=True)
        if unit is not None:
            self._waiting.appendleft((name, unit))
            self._deaths[name] += not preempted
            if self._deaths[name] >= _TRIES:
                raise RunError(
                    f"{name}: its worker died {_TRIES} times (out of memory, or killed); the same command goes on from here"
                ) from error
        elif not preempted:
            self._lost += 1
            if self._lost >= _TRIES:
                raise RunError(f"{_TRIES} workers died while they started: {error}") from error


def map_units(
    kind: ActorKind,
    method: str,
    units: Mapping[str, Unit],
    *,
    size: PoolSize,
    on_result: Callable[[str, Any], None],
    in_flight: int = 1,
) -> None:
    """Run `actor.method(unit)` for every unit on a pool of actors, handing the next unit to whichever is free.

    An actor that dies is replaced and its unit goes to the next free one, a bounded number of times; actors that a node
    took along when it went away do not count. Finished units stay finished. Actors that the cluster has no room for yet
    wait as demand, which an autoscaler sees, while the others work; an actor without work is given up at once.

    Args:
        kind: how actors are started.
        method: the method's name; it takes one unit.
        units: name -> unit; names stand in errors.
        size: of the pool.
        on_result: called in this process with (name, result), in order of completion.
        in_flight: units that one actor holds at a time. No more results than actors × in_flight wait for this process.

    Raises:
        InputError: raised by the method or the actor's constructor.
        RunError: the method failed, or its actor died too often (the unit is named), or the cluster placed no actor in time (what
            it lacks is named).
    """
    if not units:
        return
    pool: _Pool[Unit] = _Pool(kind, method, units, size, on_result, in_flight)
    try:
        pool.run()
    finally:
        pool.close()


def _nodes(actor: Any) -> list[str]:
    """The nodes of an actor and of those that it leads, if it does; run in the actor."""
    import ray

    led = actor.nodes() if hasattr(actor, "nodes") else []
    return [str(ray.get_runtime_context().get_node_id()), *led]


def _alive(nodes: Sequence[str]) -> bool:
    import ray

    living = {found["NodeID"] for found in ray.nodes() if found["Alive"]}
    return living.issuperset(nodes)
