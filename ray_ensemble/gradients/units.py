"""What the gradient pass is cut into: units of length-sorted batches of one split, each a file once it is done. No Ray here.

Units depend on the data and the settings alone, so features do not depend on the number of replicas, on their order, or on
what was killed in between.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ray_ensemble.config import GradientsConfig
from ray_ensemble.files import sha256_json, whole_file
from ray_ensemble.gradients.per_example import Collected, Kind
from ray_ensemble.gradients.store import split_folder, write_split
from ray_ensemble.models import Batch, LabelTree, length_sorted_batches, make_batch
from ray_ensemble.tasks import EncodedExample, EncodedTask, split_hash

GradientSplit = Literal["train", "validation"]
SPLITS: tuple[GradientSplit, ...] = ("train", "validation")
COUNTS = ("forward_tokens", "backward_tokens", "halved_batches")

UNIT_EXAMPLES = 32


@dataclass(frozen=True)
class ReplicaSpec:
    """What a worker needs to load the base for itself: where it is, how to quantise it, θ₀, and a token id to pad with.

    `initial_adapter` is a folder, or what `storage.located` makes of one.
    """

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

    def made(self, pad_id: int, device: torch.device) -> list[Batch]:
        """The unit's batches as tensors."""
        tree = LabelTree.of(self.label_ids)
        return [
            make_batch(examples, [tree] * len(examples), len(self.label_ids), pad_id, device)
            for examples in self.batches
        ]

    def halved(self) -> GradientUnit | None:
        """The same examples in batches of half the size; None if every batch holds one example already."""
        if all(len(batch) == 1 for batch in self.batches):
            return None
        halves: list[tuple[EncodedExample, ...]] = []
        for batch in self.batches:
            middle = (len(batch) + 1) // 2
            halves.extend(half for half in (batch[:middle], batch[middle:]) if half)
        return GradientUnit(self.kind, self.label_ids, tuple(halves), self.indices)

    @property
    def targets(self) -> int:
        """Gradients that each example gives."""
        return 1 if self.kind == "margin" else len(self.label_ids) - 1


@dataclass(frozen=True)
class UnitResult:
    """What a worker sends back: a unit's arrays in the order of its indices, and what they took."""

    arrays: dict[str, NDArray[np.float32]]
    counts: dict[str, int]
    peak_memory_bytes: int

    @classmethod
    def of(cls, kind: Kind, collected: Collected, counts: dict[str, int], peak_memory_bytes: int) -> UnitResult:
        """From tensors: margins and features of `margin` units, class scores and class features of `classes` units."""
        if kind == "margin":
            tensors = {"margins": collected.margins, "features": collected.features}
        else:
            tensors = {"class_scores": collected.scores, "class_features": collected.features}
        return cls({name: t.float().cpu().numpy() for name, t in tensors.items()}, counts, peak_memory_bytes)

    def save(self, path: Path) -> None:
        """Keep the result as one file, whole or not at all."""
        contents = {**self.arrays, **{key: np.array(self.counts[key]) for key in COUNTS}}
        with whole_file(path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **contents)


def part_is_whole(path: Path) -> bool:
    """Whether a unit's file is there and undamaged; damage is told."""
    if not path.is_file():
        return False
    try:
        with np.load(path, allow_pickle=False) as part:
            for key in part.files:
                part[key]  # reading checks the archive's checksums
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        print(f"recomputing {path.name}: damaged ({error})", flush=True)
        return False
    return True


class SplitPlan:
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
            "projection": config.projection,
            "start": config.start,
            "dtype": "float32",
            "batch_tokens": config.batch_tokens,
            "threads": config.threads,
            "shards": config.shards,
            **provenance,
        }
        key = sha256_json(self.info)[:12]
        nodes = len(LabelTree.of(task.label_ids).tokens)
        batches = length_sorted_batches([len(e.prompt_ids) + nodes for e in examples], config.batch_tokens)
        self.units: dict[str, GradientUnit] = {}
        run: list[list[int]] = []
        for batch in [*batches, None]:
            if batch is None or (run and sum(map(len, run)) + len(batch) > UNIT_EXAMPLES):
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
        counts = dict.fromkeys(COUNTS, 0)
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
