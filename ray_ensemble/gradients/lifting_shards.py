"""Lifting on a base that is larger than one device: a unit's weighted backward pass through a pipeline of shards.

Each shard keeps the sum of its own layers' gradients until the unit is through; only hidden states and their gradients travel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_ensemble.config import GradientsConfig
from ray_ensemble.gradients.lifting import LiftingUnit
from ray_ensemble.gradients.linearity import Delta, Parameters, lora_parameters, score_differences
from ray_ensemble.gradients.pipeline import Pipeline, ShardHolder, Wire, to_wire
from ray_ensemble.gradients.units import ReplicaSpec
from ray_ensemble.models import Batch
from ray_ensemble.models.scoring import scores_of_logits
from ray_ensemble.models.shard import ShardRun


class OrderedSum:
    """Σ over the batches of a unit, added in their order whatever order they arrive in: sums of floats depend on it."""

    def __init__(self, parameters: Parameters) -> None:
        self._total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        self._waiting: dict[int, tuple[Tensor, ...]] = {}
        self._next = 0

    def add(self, place: int, gradients: tuple[Tensor, ...]) -> None:
        """The gradients of batch `place`, in the order of the parameters."""
        self._waiting[place] = gradients
        while self._next in self._waiting:
            for name, gradient in zip(self._total, self._waiting.pop(self._next), strict=True):
                self._total[name] += gradient
            self._next += 1

    def total(self) -> Delta:
        """The sum by canonical name, float32."""
        assert not self._waiting, "a batch is missing"
        return self._total


class LiftingShard(ShardHolder):
    """One shard of a replica that lifts; the plain class behind the Ray actor."""

    def __init__(self, spec: ReplicaSpec, config: GradientsConfig, shard: int) -> None:
        super().__init__(spec, config, shard)
        self._run = ShardRun(self.model, self.layers)
        self.model.requires_grad_(False)
        self._parameters = lora_parameters(self.model)
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
        self._under_way: dict[tuple[str, int], tuple[Tensor, list[Tensor]]] = {}
        self._sums: dict[str, OrderedSum] = {}

    def forward(self, key: str, unit: LiftingUnit, place: int, hidden: Wire | None) -> Wire:
        """Batch `place` of a unit forward through a shard that is not the last."""
        _, entered, left = self._enter(unit, place, hidden)
        self._under_way[key, place] = left, entered
        return to_wire(left)

    def backward(self, key: str, place: int, gradients: Wire) -> Wire | None:
        """Backward pass of a batch that went forward before: gradients for the shard before, None in the first."""
        left, entered = self._under_way.pop((key, place))
        return self._take(key, place, left, entered, self.from_wire(gradients))

    def turn(self, key: str, unit: LiftingUnit, place: int, hidden: Wire) -> tuple[Wire | None, Wire]:
        """Batch `place` of a unit through the last shard and back: gradients for the shard before, and label scores (N, K)."""
        batch, entered, left = self._enter(unit, place, hidden)
        scores = scores_of_logits(left, batch)
        first = sum(len(examples) for examples in unit.examples.batches[:place])
        shares = torch.as_tensor(unit.shares[first : first + batch.size], dtype=torch.float32).to(self.device)
        value = (shares * score_differences(scores, batch.labels, shares.shape[1])).sum()
        return self._take(key, place, value, entered), to_wire(scores)

    def lifted(self, key: str) -> dict[str, NDArray[np.float32]]:
        """This shard's part of a unit's sum, once all of its batches are back."""
        return {name: value.cpu().numpy() for name, value in self._sums.pop(key).total().items()}

    def _enter(self, unit: LiftingUnit, place: int, hidden: Wire | None) -> tuple[Batch, list[Tensor], Tensor]:
        batch = self.batch(unit.examples.label_ids, unit.examples.batches[place])
        entered = [] if hidden is None else [self.from_wire(hidden).requires_grad_(True)]
        return batch, entered, self._run(batch, entered[0] if entered else None)

    def _take(
        self, key: str, place: int, left: Tensor, entered: list[Tensor], gradients: Tensor | None = None
    ) -> Wire | None:
        found = torch.autograd.grad(left, [*entered, *self._parameters.values()], gradients)
        if key not in self._sums:
            self._sums[key] = OrderedSum(self._parameters)
        self._sums[key].add(place, found[len(entered) :])
        return to_wire(found[0]) if entered else None


class ShardedLifting(Pipeline):
    """A replica that lifts."""

    shard_class = LiftingShard

    def lift(self, unit: LiftingUnit) -> dict[str, Any]:
        """As `LiftingReplica.lift`."""
        import ray

        reference = ray.put(unit)
        key = reference.hex()
        sent = self.streamed(len(unit.examples.batches), lambda place: self._send(key, reference, place))
        scores = np.concatenate([found for found, _ in sent])
        parts = self.get([shard.lifted.remote(key) for shard in self.shards])
        return {
            "delta": {name: value for part in parts for name, value in part.items()},
            "scores": scores,
            "tokens": sum(batch.tokens for batch in unit.examples.made(0, torch.device("cpu"))),
            "peak_memory_bytes": self.peak_memory_bytes(),
        }

    def _send(self, key: str, unit: Any, place: int) -> list[Any]:
        """Set a batch on its way; returns references to its scores and to the end of its way back."""
        *front, last = self.shards
        hidden = None
        for shard in front:
            hidden = shard.forward.remote(key, unit, place, hidden)
        gradients, scores = last.turn.options(num_returns=2).remote(key, unit, place, hidden)
        for shard in reversed(front):
            gradients = shard.backward.remote(key, place, gradients)
        return [scores, gradients]
