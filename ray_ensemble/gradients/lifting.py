"""Lifting by Ray actors: a fit's shares of training examples become a step of the adapter (DESIGN section 2.3).

Δθ = Σ_x Σ_k shares_xk ∇(s_y − s_k) at θ₀ is one weighted backward pass. It is cut into the units of the gradient pass, whose sums
are added in the units' order, so that the step does not depend on how many replicas there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from ray_ensemble.config import GradientsConfig
from ray_ensemble.files import whole_folder
from ray_ensemble.gradients.linearity import Delta, lift_with_scores, norm
from ray_ensemble.gradients.replicas import within_memory
from ray_ensemble.gradients.units import GradientUnit, ReplicaSpec, SplitPlan
from ray_ensemble.models import attach_adapters, default_device, load_base, materialise, quiet_libraries
from ray_ensemble.pool import PlainActors, map_units, pool_size
from ray_ensemble.progress import Bar
from ray_ensemble.runtime import peak_memory_bytes
from ray_ensemble.storage import adapter_copy
from ray_ensemble.tasks import EncodedTask

_PREFIX = "base_model.model."  # of canonical names in a saved adapter


@dataclass(frozen=True)
class LiftingUnit:
    """Examples of one task and the shares (n, K − 1) of their wrong labels, or (n, 1) of one margin, in the unit's order."""

    examples: GradientUnit
    shares: NDArray[np.float64]


@dataclass(frozen=True)
class Lifted:
    """Δθ by canonical name (float32, on the CPU), the label scores (N, K) at θ₀ of each task's examples, and what it took."""

    delta: Delta
    scores: tuple[NDArray[np.float32], ...]
    tokens: int
    peak_memory_bytes: int


class LiftingReplica:
    """One replica of the base with θ₀; the plain class behind the Ray actor."""

    def __init__(self, spec: ReplicaSpec, threads: int) -> None:
        quiet_libraries()
        torch.set_num_threads(threads)
        self._device = default_device()
        base = load_base(materialise(spec.source), spec.quantization, self._device)
        self._model = attach_adapters(base, {"default": adapter_copy(spec.initial_adapter)})
        self._model.requires_grad_(False)
        self._pad_id = spec.pad_id

    def lift(self, unit: LiftingUnit) -> dict[str, Any]:
        """The unit's sum of gradients by canonical name, its label scores in its order, tokens, peak memory in bytes."""

        def compute(examples: GradientUnit) -> tuple[Delta, list[Tensor], int]:
            batches = examples.made(self._pad_id, self._device)
            cuts = np.cumsum([batch.size for batch in batches])[:-1]
            shares = [torch.as_tensor(part, dtype=torch.float32) for part in np.split(unit.shares, cuts)]
            weighted = [(batch, part.to(self._device)) for batch, part in zip(batches, shares, strict=True)]
            return *lift_with_scores(self._model, weighted), sum(batch.tokens for batch in batches)

        (delta, scores, tokens), _ = within_memory(unit.examples, compute)
        return {
            "delta": {name: value.cpu().numpy() for name, value in delta.items()},
            "scores": torch.cat(scores).cpu().numpy(),
            "tokens": tokens,
            "peak_memory_bytes": peak_memory_bytes(),
        }


def lift_group(
    tasks: Sequence[EncodedTask],
    shares: Sequence[NDArray[np.float64]],
    spec: ReplicaSpec,
    config: GradientsConfig,
    base: dict[str, str],
) -> Lifted:
    """Lift a fit on the training examples of `tasks`, those that the gradient store holds.

    Args:
        tasks: the members of a group.
        shares: for each the weights (N, K − 1) or (N, 1) of its training rows, as `estimator.lifting` gives them.
        spec: how a replica loads the base and θ₀.
        config: replicas, shards, threads, batch tokens, `max_examples`.
        base: hashes of the base and θ₀.
    """
    units: dict[str, LiftingUnit] = {}
    for task, own in zip(tasks, shares, strict=True):
        for name, unit in SplitPlan(task, "train", config, base).units.items():
            units[name] = LiftingUnit(unit, own[list(unit.indices)])
    scores = [np.empty((len(own), len(task.labels)), np.float32) for task, own in zip(tasks, shares, strict=True)]
    by_task = {task.name: array for task, array in zip(tasks, scores, strict=True)}
    total: dict[str, NDArray[np.float32]] = {}
    waiting: dict[str, Mapping[str, NDArray[np.float32]]] = {}
    order = list(units)
    tokens, peak = 0, 0
    with Bar("lifting a booster", sum(len(own) for own in shares), "examples") as bar:

        def keep(name: str, result: dict[str, Any]) -> None:
            nonlocal tokens, peak
            tokens, peak = tokens + result["tokens"], max(peak, result["peak_memory_bytes"])
            indices = list(units[name].examples.indices)
            by_task[name.rsplit("-", 3)[0]][indices] = result["scores"]
            waiting[name] = result["delta"]
            while order and order[0] in waiting:  # sums of floats depend on their order
                for key, value in waiting.pop(order.pop(0)).items():
                    total[key] = total[key] + value if key in total else value
            bar.advance(len(indices))

        size = pool_size(config.replicas, config.threads, len(units), config.shards)
        if config.shards == 1:
            actors = PlainActors(LiftingReplica, (spec, config.threads), config, size)
            map_units(actors, "lift", units, size=size, on_result=keep)
        else:
            from ray_ensemble.gradients.lifting_shards import ShardedLifting
            from ray_ensemble.gradients.pipeline import map_pipelines

            map_pipelines(ShardedLifting, "lift", units, spec=spec, config=config, size=size, on_result=keep)
    delta = {name: torch.from_numpy(np.array(value)) for name, value in total.items()}
    return Lifted(delta, tuple(scores), tokens, peak)


def save_moved(start: Path, delta: Delta, target: Path, factor: float, longest: float | None) -> tuple[float, float]:
    """Write the adapter θ₀ + factor·Δθ as a PEFT folder, whole or not at all.

    Args:
        start: the saved adapter θ₀.
        delta: Δθ by canonical name.
        target: the folder to write.
        factor: that Δθ is multiplied by.
        longest: how far from θ₀ to go at most, relative to ‖θ₀‖; the factor is lowered to that.

    Returns:
        The factor, and the distance from θ₀ relative to ‖θ₀‖.
    """
    saved = load_file(start / "adapter_model.safetensors")
    length = norm(delta) / norm(saved)
    if longest is not None and factor * length > longest:
        factor = longest / length
    moved = {name: value + factor * delta[name.removeprefix(_PREFIX)].to(value.dtype) for name, value in saved.items()}
    with whole_folder(target) as temporary:
        save_file(moved, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        (temporary / "adapter_config.json").write_bytes((start / "adapter_config.json").read_bytes())
    return factor, factor * length
