"""What the kind of projection does to the estimate: Rademacher and Kronecker maps of one d against a much larger d.

    python benchmarks/projections.py --json projections.json

All maps see the same gradients, collected in one pass over the tasks of a job file. For each map and seed it measures

- `inner`: the error of inner products φ(x)·φ(y) of training examples against those of the reference map (rademacher,
  `--reference` columns), relative to the product of the norms, root of the mean square over pairs;
- `loss`: the mean absolute difference of the estimated validation loss to that under the reference map, in nats, over groups
  (every task alone, all tasks, and random subsets) and their members;
- `rank`: Spearman's correlation of these losses with the reference's, after taking each task's mean off both;
- `signs`: signs made for one flush of the buffer, and `seconds` that projecting one batch of `--batch` examples takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from ray_ensemble.config import GradientsConfig, load_config
from ray_ensemble.estimator import Estimator, TaskFeatures, choose_regularization, pairwise_margins, sample_subsets
from ray_ensemble.gradients.per_example import GradientCollector
from ray_ensemble.gradients.projection import Projection, ProjectionKind, kronecker_factors
from ray_ensemble.gradients.units import SPLITS, SplitPlan
from ray_ensemble.models import (
    attach_adapters,
    default_device,
    draw_initial_adapter,
    load_base,
    load_tokenizer,
    lora_layers,
    materialise,
    quiet_libraries,
)
from ray_ensemble.progress import Bar
from ray_ensemble.stages import encode_all
from ray_ensemble.tasks import load_tasks

JOB = Path(__file__).parent.parent / "examples" / "quickstart.yaml"


@dataclass(frozen=True)
class Map:
    """A projection under test."""

    kind: ProjectionKind
    dim: int
    seed: int


class SideBySide(Projection):
    """Several maps at once: features are theirs, one after the other, so that one gradient pass serves all."""

    def __init__(self, maps: list[Map], device: torch.device) -> None:
        super().__init__(sum(m.dim for m in maps), 0, device)
        self._parts = [Projection(m.dim, m.seed, device, m.kind) for m in maps]

    def apply(self, name: str, gradients: Tensor) -> Tensor:
        """(N, Σd) features of all maps."""
        return torch.cat([part.apply(name, gradients) for part in self._parts], dim=1)


def collect(job: Path, maps: list[Map], folder: Path) -> tuple[list[TaskFeatures], list[tuple[int, int]]]:
    """Features of a job's tasks under all maps side by side, and the shapes (out, rank) of the projected gradients."""
    config = load_config(job)
    device = default_device()
    model_folder = materialise(config.model.source)
    draw_initial_adapter(load_base(model_folder, "none", torch.device("cpu")), config.adapter, folder / "init")
    model = attach_adapters(load_base(model_folder, "none", device), {"default": folder / "init"})
    collector = GradientCollector(model, SideBySide(maps, device))
    tasks = encode_all(load_tasks(config.tasks, config.limits, Path.cwd()), load_tokenizer(model_folder), config)
    settings = GradientsConfig(batch_tokens=config.gradients.batch_tokens)
    found = []
    total = sum(len(task[split]) for task in tasks for split in SPLITS)
    with Bar("gradients", total, "examples") as bar:
        for task in tasks:
            arrays: dict[str, tuple[NDArray[Any], ...]] = {}
            for split in SPLITS:
                plan = SplitPlan(task, split, settings, {})
                scores = np.empty((plan.examples, len(task.labels)), dtype=np.float32)
                features: NDArray[Any] | None = None
                for unit in plan.units.values():
                    collected = collector.collect(unit.made(0, device), "classes")
                    if features is None:
                        features = np.empty((plan.examples, *collected.features.shape[1:]), dtype=np.float32)
                    scores[list(unit.indices)] = collected.scores.numpy()
                    features[list(unit.indices)] = collected.features.numpy()
                    bar.advance(len(unit.indices), task.name)
                assert features is not None
                arrays[split] = (scores, features, plan.labels)
            rows, margins, starts = pairwise_margins(*arrays["train"])
            scores, class_features, labels = arrays["validation"]
            found.append(
                TaskFeatures(
                    name=task.name, train_features=rows, train_margins=margins, train_starts=starts,
                    validation_scores=scores, validation_features=class_features, validation_labels=labels,
                )
            )  # fmt: skip
    shapes = [tuple(layer.lora_B["default"].weight.shape) for layer in lora_layers(model).values()]
    return found, [(int(p), int(q)) for p, q in shapes]


def cut(features: list[TaskFeatures], first: int, stop: int) -> list[TaskFeatures]:
    """The features of one map."""
    return [
        TaskFeatures(
            name=task.name,
            train_features=np.ascontiguousarray(task.train_features[:, first:stop]),
            train_margins=task.train_margins,
            train_starts=task.train_starts,
            validation_scores=task.validation_scores,
            validation_features=np.ascontiguousarray(task.validation_features[:, :, first:stop]),
            validation_labels=task.validation_labels,
        )
        for task in features
    ]


def losses(features: list[TaskFeatures], job: Path, regularization: float, groups: list[tuple[int, ...]]) -> Any:
    """Estimated validation losses of every (group, member), and the member of each."""
    estimator = Estimator(features, load_config(job).training, regularization)
    values: list[float] = []
    members: list[int] = []
    for group in groups:
        estimate = estimator.group(group)
        values.extend(half.loss for half in estimate.report)
        members.extend(estimate.members)
    return np.array(values), np.array(members)


def centred(values: NDArray[Any], members: NDArray[Any]) -> NDArray[Any]:
    """Values less the mean of their task."""
    means = np.array([values[members == task].mean() for task in range(members.max() + 1)])
    result: NDArray[Any] = values - means[members]
    return result


def gram(features: list[TaskFeatures]) -> NDArray[Any]:
    """Inner products of all training rows, relative to the product of their norms."""
    rows = np.concatenate([task.train_features for task in features]).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    result: NDArray[Any] = rows @ rows.T  # (N, d) @ (d, N)
    return result


def project_seconds(item: Map, shapes: list[tuple[int, int]], batch: int) -> float:
    """Median seconds of five for projecting the gradients of one batch."""
    projection = Projection(item.dim, item.seed, kind=item.kind)
    gradients = [torch.randn(batch, p, q) for p, q in shapes]
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        for place, gradient in enumerate(gradients):
            projection.apply(f"layer {place}", gradient)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def signs(item: Map, shapes: list[tuple[int, int]]) -> int:
    """Signs that one pass over all parameters makes."""
    if item.kind == "rademacher":
        return sum(p * q for p, q in shapes) * item.dim
    factors = [(p, q, *kronecker_factors(item.dim, p, q)) for p, q in shapes]
    return sum(p * left + q * right for p, q, left, right in factors)


def main() -> None:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=Path, default=JOB)
    parser.add_argument("--dim", type=int, default=400)
    parser.add_argument("--reference", type=int, default=4096)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/projections"))
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    kinds: tuple[ProjectionKind, ...] = ("rademacher", "kronecker")
    reference = Map("rademacher", arguments.reference, 1000)
    maps = [reference] + [Map(kind, arguments.dim, seed) for kind in kinds for seed in range(arguments.seeds)]
    features, shapes = collect(arguments.job, maps, arguments.work)
    count = len(features)
    groups = [(task,) for task in range(count)] + [tuple(range(count))]
    groups += [tuple(int(task) for task in group) for group in sample_subsets(count, 30, min(3, count), 0)]
    exact = cut(features, 0, reference.dim)
    regularization = choose_regularization(exact, load_config(arguments.job).training, groups[count + 1 :]).value
    want, members = losses(exact, arguments.job, regularization, groups)
    exact_gram = gram(exact)
    rows: list[dict[str, Any]] = []
    first = reference.dim
    for item in maps[1:]:
        mine = cut(features, first, first + item.dim)
        first += item.dim
        found, _ = losses(mine, arguments.job, regularization, groups)
        error = gram(mine) - exact_gram
        rows.append(
            {
                "kind": item.kind,
                "dim": item.dim,
                "seed": item.seed,
                "inner": float(np.sqrt((error[np.triu_indices(len(error), 1)] ** 2).mean())),
                "loss": float(np.abs(found - want).mean()),
                "rank": float(spearmanr(centred(found, members), centred(want, members)).statistic),
                "signs": signs(item, shapes),
                "seconds": project_seconds(item, shapes, arguments.batch),
            }
        )
    print(f"\n{'map':<12}{'d':>6}{'seed':>6}{'inner':>9}{'loss':>9}{'rank':>8}{'signs':>14}{'seconds':>10}")
    for row in rows:
        print(
            f"{row['kind']:<12}{row['dim']:>6}{row['seed']:>6}{row['inner']:>9.4f}{row['loss']:>9.4f}{row['rank']:>8.3f}"
            f"{row['signs']:>14,}{row['seconds']:>10.4f}"
        )
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(
        json.dumps({"reference": reference.dim, "groups": len(groups), "estimates": len(want), "rows": rows}, indent=2)
        + "\n"
    )


if __name__ == "__main__":
    main()
