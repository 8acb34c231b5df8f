"""Gradients on one shard of the base: its part of the forward and backward passes, and of the features. No Ray here.

A d-vector of an example is the sum of what its shards project, since each projects its own layers under their global names.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import Tensor

from ray_ensemble.gradients.per_example import Capture, GradientCollector, Kind
from ray_ensemble.gradients.projection import Projection
from ray_ensemble.models.scoring import Batch, margins, scores_of_logits
from ray_ensemble.models.shard import ShardRun


@dataclass
class _Pending:
    """A batch between its forward and its backward pass through this shard."""

    batch: Batch
    capture: Capture
    entered: Tensor | None  # (N, T, H), a leaf that gathers the gradient for the shard before
    left: Tensor  # (N, T, H)
    slots: Tensor = field(repr=False)


@dataclass(frozen=True)
class Turned:
    """What the last shard gives: scores (N, K), gradients (P, N, T, H) for the shard before, its share of the features."""

    scores: Tensor
    gradients: Tensor
    features: Tensor


class GradientShard:
    """One stage of the pipeline. Batches may be on their way through it in any number and order.

    Args:
        model: the shard with its part of θ₀, in eval mode.
        layers: the layers that it holds.
        projection: the map φ = Pᵀg.
    """

    def __init__(self, model: PeftModel, layers: range, projection: Projection) -> None:
        self._collector = GradientCollector(model, projection)
        self._run = ShardRun(model, layers)
        self._dim = projection.dim
        self._pending: dict[str, _Pending] = {}

    def forward(self, key: str, batch: Batch, kind: Kind, hidden: Tensor | None) -> Tensor:
        """Forward pass of a batch through a shard that is not the last: (N, T, H) for the next one."""
        pending = self._enter(batch, kind, hidden)
        self._pending[key] = pending
        return pending.left.detach()

    def backward(self, key: str, gradients: Tensor) -> tuple[Tensor | None, Tensor]:
        """Backward passes of a batch that went forward before.

        Args:
            key: the batch's.
            gradients: (P, N, T, H) of the P targets with respect to what `forward` returned.

        Returns:
            Gradients (P, N, T, H) for the shard before (None in the first), and this shard's share (N·P, d) of the features.
        """
        pending = self._pending.pop(key)
        back: list[Tensor] = []
        for p, gradient in enumerate(gradients):
            pending.capture.slots = pending.slots + p
            self._collector.backward(pending.left, pending.batch, gradient, retain=p + 1 < len(gradients))
            self._take(pending, back)
        return torch.stack(back) if back else None, pending.capture.buffer.features()

    def turn(self, batch: Batch, kind: Kind, hidden: Tensor) -> Turned:
        """Forward pass of a batch through the last shard, and its backward passes at once."""
        pending = self._enter(batch, kind, hidden)
        scores = scores_of_logits(pending.left, batch)
        if kind == "margin":
            targets = [margins(scores, batch.labels).sum()]
        else:
            targets = [(scores[:, k] - scores[:, 0]).sum() for k in range(1, batch.classes)]
        back: list[Tensor] = []
        for p, target in enumerate(targets):
            pending.capture.slots = pending.slots + p
            self._collector.backward(target, batch, retain=p + 1 < len(targets))
            self._take(pending, back)
        return Turned(scores.detach(), torch.stack(back), pending.capture.buffer.features())

    def _enter(self, batch: Batch, kind: Kind, hidden: Tensor | None) -> _Pending:
        per_example = 1 if kind == "margin" else batch.classes - 1
        slots = torch.arange(batch.size, device=batch.labels.device) * per_example
        # A buffer for each batch: the features must not depend on which batches happened to be under way together.
        capture = Capture(self._collector.buffer(batch.size * per_example, batch.labels.device), slots)
        entered = None if hidden is None else hidden.detach().requires_grad_(True)
        with self._collector.capturing(capture, batch):
            left = self._run(batch, entered)
        return _Pending(batch, capture, entered, left, slots)

    def _take(self, pending: _Pending, back: list[Tensor]) -> None:
        if pending.entered is not None:
            assert pending.entered.grad is not None
            back.append(pending.entered.grad)
            pending.entered.grad = None
