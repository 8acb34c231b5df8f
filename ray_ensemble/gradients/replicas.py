"""The gradient pass as Ray actors: each holds a replica of the base with θ₀ and turns units of examples into features.

A unit is a fixed run of length-sorted batches of one split, so that the features do not depend on the number of replicas, on
their order, or on what was killed in between. Finished units are files; a rerun computes only those that are missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ray_ensemble.config import GradientsConfig
from ray_ensemble.files import read_json, sha256_json, whole_file, write_json
from ray_ensemble.gradients.store import damage, split_folder, write_split
from ray_ensemble.models import (
    LabelRows,
    attach_adapters,
    default_device,
    length_sorted_batches,
    load_base,
    make_batch,
    materialise,
    quiet_libraries,
)
from ray_ensemble.progress import Bar
from ray_ensemble.runtime import map_units, peak_memory_bytes, pool_size
from ray_ensemble.tasks import EncodedExample, EncodedTask, split_hash

_UNIT_EXAMPLES = 32
_COUNTS = ("forward_tokens", "backward_tokens")
GradientSplit = Literal["train", "validation"]
Kind = Literal["margin", "classes"]  # one gradient an example, or one for each label but the first
SPLITS: tuple[GradientSplit, ...] = ("train", "validation")


@dataclass(frozen=True)
class ReplicaSpec:
    """What a worker needs to load the base for itself: where it is, how to quantise it, θ₀, and a token id to pad with."""

    source: str
    quantization: str
    initial_adapter: str
    pad_id: int


@dataclass(frozen=True)
class GradientUnit:
    """A run of batches of one split. `indices` are the examples' places in the split, batch by batch."""

    kind: Kind
    label_ids: tuple[tuple[int, ...], ...]
    batches: tuple[tuple[EncodedExample, ...], ...]
    indices: tuple[int, ...]


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
        model = attach_adapters(base, {"default": Path(spec.initial_adapter)})
        self._collector = GradientCollector(model, Projection(config.dim, config.seed, self._device))
        self._pad_id = spec.pad_id

    def collect(self, unit: GradientUnit) -> dict[str, Any]:
        """Features of a unit: arrays by name in the order of `unit.indices`, tokens seen, peak memory in bytes."""
        rows = LabelRows.of(unit.label_ids)
        classes = len(unit.label_ids)
        arrays: dict[str, list[NDArray[np.float32]]] = {}
        before = self._collector.tokens_forward, self._collector.tokens_backward
        for examples in unit.batches:
            batch = make_batch(examples, [rows] * len(examples), classes, self._pad_id, self._device)
            if unit.kind == "margin":
                result = self._collector.margin_features(batch)
                parts = {"margins": result.margins, "features": result.features}
            else:
                scored = self._collector.class_features(batch)
                parts = {"class_scores": scored.scores, "class_features": scored.features}
            for name, tensor in parts.items():
                arrays.setdefault(name, []).append(tensor.float().cpu().numpy())
        return {
            "arrays": {name: np.concatenate(parts) for name, parts in arrays.items()},
            "forward_tokens": self._collector.tokens_forward - before[0],
            "backward_tokens": self._collector.tokens_backward - before[1],
            "peak_memory_bytes": peak_memory_bytes(),
        }


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
        config: d, seed, replicas, threads.
        provenance: hashes of the base and θ₀, kept beside the arrays.
        folder: the store.
    """
    plan = {(task.name, split): _SplitPlan(task, split, config, provenance) for task in tasks for split in SPLITS}
    parts = folder / ".parts"
    units: dict[str, GradientUnit] = {}
    owner: dict[str, _SplitPlan] = {}
    done = 0
    for (name, split), item in plan.items():
        reason = damage(split_folder(folder, name, split), item.info)
        if reason is None:
            done += item.examples
            continue
        if reason != "missing":
            print(f"recomputing {name}/{split}: {reason}", flush=True)
        for unit_name, unit in item.units.items():
            if _part_is_whole(parts / f"{unit_name}.npz"):
                done += len(unit.indices)
            else:
                units[unit_name] = unit
            owner[unit_name] = item
    total = sum(item.examples for item in plan.values())
    actors = pool_size(config.replicas, config.threads, max(1, len(units)))
    peak = 0
    if units:
        with Bar(f"gradients on {actors} replica{'s' * (actors > 1)}", total, "examples", done) as bar:

            def keep(unit_name: str, result: dict[str, Any]) -> None:
                nonlocal peak
                peak = max(peak, result["peak_memory_bytes"])
                contents = {**result["arrays"], **{key: np.array(result[key]) for key in _COUNTS}}
                with whole_file(parts / f"{unit_name}.npz") as temporary, temporary.open("wb") as stream:
                    np.savez(stream, allow_pickle=False, **contents)
                bar.advance(len(units[unit_name].indices), unit_name.rpartition("-")[0])

            map_units(
                GradientReplica, (spec, config), "collect", units,
                actors=actors, threads=config.threads, on_result=keep,
            )  # fmt: skip
    for item in {id(i): i for i in owner.values()}.values():
        item.assemble(parts, folder)
    summary = _summary(folder, plan, peak)
    write_json(
        folder / "info.json",
        {
            "tasks": [task.name for task in tasks],
            "dim": config.dim,
            "seed": config.seed,
            "start": config.start,
            "dtype": "float32",
            **provenance,
        },
    )
    for left in parts.glob("*.npz"):
        left.unlink()
    if parts.is_dir():
        parts.rmdir()
    return summary


class _SplitPlan:
    """One split's units and the description that its folder must carry."""

    def __init__(
        self, task: EncodedTask, split: GradientSplit, config: GradientsConfig, provenance: dict[str, str]
    ) -> None:
        examples = task[split]
        if split == "train" and config.max_examples is not None:
            examples = examples[: config.max_examples]
        self.task, self.split, self.examples = task, split, len(examples)
        # With two labels the margin is the difference of scores up to its sign: one gradient tells all.
        margin = split == "train" and (len(task.labels) == 2 or config.targets == "margin")
        self.kind: Kind = "margin" if margin else "classes"
        self.labels = np.array([example.label for example in examples], dtype=np.int64)
        self.info = {
            "task": task.name,
            "split": split,
            "kind": self.kind,
            "examples": len(examples),
            "data": split_hash(task, examples),
            "dim": config.dim,
            "seed": config.seed,
            "start": config.start,
            "dtype": "float32",
            "batch_tokens": config.batch_tokens,
            "threads": config.threads,
            **provenance,
        }
        key = sha256_json(self.info)[:12]
        rows = LabelRows.of(task.label_ids)
        longest = max(len(row) for row in rows.rows)
        batches = length_sorted_batches(
            [len(e.prompt_ids) + longest for e in examples], len(rows.rows), config.batch_tokens
        )
        self.units: dict[str, GradientUnit] = {}
        run: list[list[int]] = []
        for batch in [*batches, None]:
            if batch is None or (run and sum(map(len, run)) + len(batch) > _UNIT_EXAMPLES):
                unit = GradientUnit(
                    self.kind,
                    task.label_ids,
                    tuple(tuple(examples[i] for i in indices) for indices in run),
                    tuple(i for indices in run for i in indices),
                )
                self.units[f"{task.name}-{split}-{key}-{len(self.units)}"] = unit
                run = []
            if batch is not None:
                run.append(batch)

    def assemble(self, parts: Path, folder: Path) -> None:
        """Put the units' results together in the split's own order."""
        arrays: dict[str, NDArray[Any]] = {"labels": self.labels}
        counts = dict.fromkeys(_COUNTS, 0)
        for name, unit in self.units.items():
            with np.load(parts / f"{name}.npz", allow_pickle=False) as part:
                for key in part.files:
                    if key in counts:
                        counts[key] += int(part[key])
                    else:
                        value = part[key]
                        target = arrays.setdefault(key, np.empty((self.examples, *value.shape[1:]), dtype=np.float32))
                        target[list(unit.indices)] = value
        write_split(split_folder(folder, self.task.name, self.split), arrays, {**self.info, **counts})


def _part_is_whole(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with np.load(path, allow_pickle=False) as part:
            for key in part.files:
                part[key]  # reading checks the archive's checksums
    except (OSError, ValueError, EOFError, KeyError) as error:
        print(f"recomputing {path.name}: damaged ({error})", flush=True)
        return False
    return True


def _summary(folder: Path, plan: dict[tuple[str, GradientSplit], _SplitPlan], peak: int) -> GradientPass:
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
