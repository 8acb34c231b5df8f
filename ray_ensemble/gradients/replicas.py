"""The gradient pass as Ray actors: each holds a replica of the base with θ₀ and turns units of examples into features.

Finished units are files; a rerun, after whatever was killed, computes only those that are missing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ray_ensemble.config import GradientsConfig
from ray_ensemble.files import read_json, remove_leftovers, write_json
from ray_ensemble.gradients.store import damage, split_folder
from ray_ensemble.gradients.units import (
    SPLITS,
    GradientSplit,
    GradientUnit,
    ReplicaSpec,
    SplitPlan,
    UnitResult,
    part_is_whole,
)
from ray_ensemble.metrics import current_figures
from ray_ensemble.models import attach_adapters, default_device, load_base, materialise, quiet_libraries
from ray_ensemble.pool import PlainActors, map_units, pool_size
from ray_ensemble.progress import Bar
from ray_ensemble.runtime import peak_memory_bytes
from ray_ensemble.storage import adapter_copy
from ray_ensemble.tasks import EncodedTask

T = TypeVar("T")


@dataclass(frozen=True)
class GradientPass:
    """What the pass did, summed over this and earlier interrupted runs of the stage."""

    examples: int
    forward_tokens: int
    backward_tokens: int
    projected: int
    peak_memory_bytes: int


class GradientReplica:
    """One replica of the base with θ₀; the plain class behind the Ray actor."""

    def __init__(self, spec: ReplicaSpec, config: GradientsConfig) -> None:
        import torch

        from ray_ensemble.gradients.per_example import GradientCollector
        from ray_ensemble.gradients.projection import Projection

        quiet_libraries()
        torch.set_num_threads(config.threads)
        self._device = default_device()
        base = load_base(materialise(spec.source), spec.quantization, self._device)
        model = attach_adapters(base, {"default": adapter_copy(spec.initial_adapter)})
        projection = Projection(config.dim, config.seed, self._device, config.projection)
        self._collector = GradientCollector(model, projection)
        self._pad_id = spec.pad_id

    def collect(self, unit: GradientUnit) -> UnitResult:
        """Features of a unit. A unit that does not fit into memory is tried again in batches of half the size."""
        collector = self._collector
        before = collector.tokens_forward, collector.tokens_backward
        collected, used = within_memory(
            unit, lambda smaller: collector.collect(smaller.made(self._pad_id, self._device), smaller.kind)
        )
        counts = {
            "forward_tokens": collector.tokens_forward - before[0],
            "backward_tokens": collector.tokens_backward - before[1],
            "halved_batches": len(used.batches) - len(unit.batches),
        }
        return UnitResult.of(unit.kind, collected, counts, peak_memory_bytes())


def within_memory(unit: GradientUnit, compute: Callable[[GradientUnit], T]) -> tuple[T, GradientUnit]:
    """`compute(unit)`, with the unit's batches halved until they fit into memory; returns the unit that did too.

    Raises:
        torch.OutOfMemoryError: one example alone does not fit.
    """
    import torch

    while True:
        try:
            return compute(unit), unit
        except (torch.OutOfMemoryError, RuntimeError) as error:
            # A CPU's allocator raises the bare class.
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            smaller = unit.halved()
            if smaller is None:
                raise
        # Out of the handler, so that what the failed pass held is free again.
        unit = smaller
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def collect_gradients(
    tasks: Sequence[EncodedTask],
    spec: ReplicaSpec,
    config: GradientsConfig,
    provenance: dict[str, str],
    folder: Path,
) -> GradientPass:
    """Fill the gradient store of `tasks` in `folder`; what is there and whole is kept, damage is named and mended.

    Args:
        tasks: encoded tasks; `gradients.max_examples` caps their training splits.
        spec: how a replica loads the base and θ₀.
        config: d, seed, projection, replicas, shards, threads.
        provenance: hashes of the base and θ₀, kept beside the arrays.
        folder: the store.
    """
    plan = {(task.name, split): SplitPlan(task, split, config, provenance) for task in tasks for split in SPLITS}
    parts = folder / ".parts"
    units: dict[str, GradientUnit] = {}
    unfinished: list[SplitPlan] = []
    done = 0
    for (name, split), item in plan.items():
        reason = damage(split_folder(folder, name, split), item.info)
        if reason is None:
            done += item.examples
            continue
        if reason != "missing":
            print(f"recomputing {name}/{split}: {reason}", flush=True)
        unfinished.append(item)
        for unit_name, unit in item.units.items():
            if part_is_whole(parts / f"{unit_name}.npz"):
                done += len(unit.indices)
            else:
                units[unit_name] = unit
    peak = _compute(units, spec, config, parts, sum(item.examples for item in plan.values()), done) if units else 0
    for item in unfinished:
        item.assemble(parts, folder)
    summary = _summary(folder, plan, peak)
    write_json(
        folder / "info.json",
        {
            "tasks": [task.name for task in tasks],
            "data": {f"{name}/{split}": item.info["data"] for (name, split), item in plan.items()},
            "dim": config.dim,
            "seed": config.seed,
            "projection": config.projection,
            "start": config.start,
            "dtype": "float32",
            **provenance,
        },
    )
    shutil.rmtree(parts, ignore_errors=True)
    remove_leftovers(folder)
    return summary


def _compute(
    units: dict[str, GradientUnit], spec: ReplicaSpec, config: GradientsConfig, parts: Path, total: int, done: int
) -> int:
    """Run units on a pool of replicas and keep each result as a file; returns the largest peak memory of an actor."""
    peak = 0
    size = pool_size(config.replicas, config.threads, len(units), config.shards)
    many = "s" if size.most > 1 else ""
    number = str(size.most) if size.least == size.most else f"{size.least} to {size.most}"
    of_shards = f" of {config.shards} shards" if config.shards > 1 else ""
    with Bar(f"gradients on {number} replica{many}{of_shards}", total, "examples", done) as bar:

        def keep(unit_name: str, result: UnitResult) -> None:
            nonlocal peak
            peak = max(peak, result.peak_memory_bytes)
            if result.counts["halved_batches"]:
                print(f"{unit_name}: batches were halved to fit into memory", flush=True)
                current_figures().count("ensemble_memory_halvings")
            result.save(parts / f"{unit_name}.npz")
            bar.advance(len(units[unit_name].indices), unit_name.rpartition("-")[0])

        if config.shards == 1:
            actors = PlainActors(GradientReplica, (spec, config), config, size)
            map_units(actors, "collect", units, size=size, on_result=keep)
        else:
            from ray_ensemble.gradients.pipeline import ShardedReplica, map_pipelines

            map_pipelines(ShardedReplica, "collect", units, spec=spec, config=config, size=size, on_result=keep)
    return peak


def _summary(folder: Path, plan: dict[tuple[str, GradientSplit], SplitPlan], peak: int) -> GradientPass:
    infos = [read_json(split_folder(folder, name, split) / "info.json") for name, split in plan]
    backwards = sum(
        item.examples * (1 if item.kind == "margin" else len(item.task.labels) - 1) for item in plan.values()
    )
    return GradientPass(
        examples=sum(item.examples for item in plan.values()),
        forward_tokens=sum(info["forward_tokens"] for info in infos),
        backward_tokens=sum(info["backward_tokens"] for info in infos),
        projected=backwards,
        peak_memory_bytes=peak,
    )
