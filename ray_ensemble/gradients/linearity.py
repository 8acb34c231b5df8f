"""How linear the model is around θ₀: margins along a direction against their first-order prediction (DESIGN section 2).

At θ = θ₀ + ρ‖θ₀‖u the prediction is f₀ + g·(θ − θ₀), with the exact gradient g and no projection. u is the direction of a lifted
fit, Δθ = Σ_x w_x Σ_k p_k ∇(s_y − s_k), which is one weighted backward pass over the training data; or what training really did.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from ray_ensemble.gradients.per_example import GradientCollector
from ray_ensemble.gradients.units import ReplicaSpec
from ray_ensemble.models import (
    Batch,
    LabelTree,
    attach_adapters,
    default_device,
    label_scores,
    length_sorted_batches,
    load_base,
    lora_layers,
    make_batch,
    margins,
    materialise,
    quiet_libraries,
)
from ray_ensemble.storage import adapter_copy
from ray_ensemble.tasks import EncodedExample

Delta = dict[str, Tensor]  # change of each LoRA parameter by canonical name
Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class LinearityUnit:
    """One direction, and the examples whose margins are followed along it.

    The direction is lifted from `train`, a (label ids, examples, shares) a task, where `shares` (N, K − 1) are the shares p_k of
    the wrong labels times the example's weight (or (N, 1) for one margin an example); or it leads to the trained `adapter`.
    `distances` are ρ for a lifted direction; a trained adapter is its own distance.
    """

    probed: tuple[tuple[tuple[tuple[int, ...], ...], tuple[EncodedExample, ...]], ...]
    train: tuple[tuple[tuple[tuple[int, ...], ...], tuple[EncodedExample, ...], NDArray[np.float64]], ...] = ()
    adapter: Path | str | None = None  # as `storage.located` tells workers of it
    distances: tuple[float, ...] = ()


@dataclass(frozen=True)
class Linearity:
    """Margins (N,) of all probed examples: f₀ and, for each distance ρ, the predicted and the real f."""

    distances: tuple[float, ...]
    model_distances: tuple[float | None, ...]
    base: NDArray[np.float64]
    predicted: NDArray[np.float64]  # (distances, N)
    real: NDArray[np.float64]  # (distances, N)

    def squares(self) -> list[dict[str, float | None]]:
        """For each distance the sums that the errors are made of (of squared remainders, values and changes, and of the losses
        log(1 + e^−f) in nats of real and of predicted margins) and the number of examples.
        """
        return [
            {
                "distance": distance,
                "model_distance": whole,
                "remainder": float(np.sum((real - predicted) ** 2)),
                "value": float(np.sum(real**2)),
                "change": float(np.sum((real - self.base) ** 2)),
                "loss": float(np.logaddexp(0.0, -real).sum()),
                "linear_loss": float(np.logaddexp(0.0, -predicted).sum()),
                "examples": float(len(real)),
            }
            for distance, whole, predicted, real in zip(
                self.distances, self.model_distances, self.predicted, self.real, strict=True
            )
        ]


class InnerProduct:
    """Stands where a projection does: maps a parameter's gradients to their inner product with a direction, (N, 1)."""

    dim = 1

    def __init__(self, delta: Delta) -> None:
        self._delta = delta

    def apply(self, name: str, gradients: Tensor) -> Tensor:
        """(N, p, q) gradients of the parameter `name` -> (N, 1) float32."""
        if name not in self._delta:
            return torch.zeros(gradients.shape[0], 1, device=gradients.device)
        return torch.einsum("npq,pq->n", gradients.float(), self._delta[name])[:, None]


def lora_parameters(model: PeftModel, adapter: str = "default") -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters by canonical name."""
    found = {}
    for name, layer in lora_layers(model).items():
        found[f"{name}.lora_A.weight"] = layer.lora_A[adapter].weight
        found[f"{name}.lora_B.weight"] = layer.lora_B[adapter].weight
    return found


def norm(tensors: Mapping[str, Tensor]) -> float:
    """Euclidean norm of all entries together."""
    return float(torch.sqrt(torch.stack([t.detach().double().square().sum() for t in tensors.values()]).sum()))


def lift(model: PeftModel, batches: Sequence[tuple[Batch, Tensor]]) -> Delta:
    """Σ_x Σ_k shares_xk ∇(s_y − s_k) over the examples of all batches, at the model's present weights."""
    return lift_with_scores(model, batches)[0]


def lift_with_scores(model: PeftModel, batches: Sequence[tuple[Batch, Tensor]]) -> tuple[Delta, list[Tensor]]:
    """The same, and the label scores (N, K) of each batch, which the pass computes anyway."""
    parameters = lora_parameters(model)
    scores = []
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        for batch, shares in batches:
            found = label_scores(model, batch)
            value = (shares * score_differences(found, batch.labels, shares.shape[1])).sum()
            for name, gradient in zip(total, torch.autograd.grad(value, list(parameters.values())), strict=True):
                total[name] += gradient
            scores.append(found.detach())
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
    return total, scores


def score_differences(scores: Tensor, labels: Tensor, columns: int) -> Tensor:
    """(N, K − 1) differences s_y − s_k in the order of the wrong labels, or (N, 1) margins where one column is wanted."""
    if columns == 1:
        return margins(scores, labels)[:, None]
    wrong = torch.arange(scores.shape[1], device=scores.device)[None, :] != labels[:, None]
    right = scores.gather(1, labels[:, None])
    return (right - scores)[wrong].view(scores.shape[0], columns)


@contextmanager
def moved(model: PeftModel, delta: Delta, factor: float) -> Iterator[None]:
    """The model at its weights + factor·delta; they come back to the bit."""
    parameters = lora_parameters(model)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    with torch.no_grad():
        for name, change in delta.items():
            parameters[name].add_(change.to(parameters[name].dtype), alpha=factor)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                parameters[name].copy_(value)


def margins_along(
    model: PeftModel, batches: Sequence[Batch], delta: Delta, factors: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Margins f₀ (N,), and at θ₀ + factor·delta the predicted and the real ones, each (factors, N)."""
    base, slopes = [], []
    collector = GradientCollector(model, InnerProduct(delta))
    for batch in batches:  # one after the other: labels may differ in number
        found = collector.collect([batch], "margin")
        base.append(found.margins.double().cpu().numpy())
        slopes.append(found.features[:, 0].double().cpu().numpy())
    f0, slope = np.concatenate(base), np.concatenate(slopes)
    real = []
    for factor in factors:
        with moved(model, delta, factor), torch.no_grad():
            real.append(
                np.concatenate([margins(label_scores(model, b), b.labels).double().cpu().numpy() for b in batches])
            )
    predicted = f0 + np.asarray(factors)[:, None] * slope
    return f0, predicted, np.stack(real)


class LinearityProbe:
    """One replica of the base with θ₀; the plain class behind the Ray actor."""

    def __init__(self, spec: ReplicaSpec, threads: int, batch_tokens: int) -> None:
        quiet_libraries()
        torch.set_num_threads(threads)
        self._device = default_device()
        base = load_base(materialise(spec.source), spec.quantization, self._device)
        self._model = attach_adapters(base, {"default": adapter_copy(spec.initial_adapter)})
        self._model.requires_grad_(False)
        self._pad_id, self._batch_tokens = spec.pad_id, batch_tokens

    def measure(self, unit: LinearityUnit) -> Linearity:
        """Margins along the unit's direction, predicted and real."""
        start = lora_parameters(self._model)
        length = norm(start)
        if unit.adapter is None:
            weighted = [pair for ids, examples, shares in unit.train for pair in self._batches(ids, examples, shares)]
            delta = lift(self._model, [(b, s) for b, s in weighted if s is not None])
            factors = [rho * length / norm(delta) for rho in unit.distances]
        else:
            delta = self._to_adapter(adapter_copy(unit.adapter), start)
            factors = [1.0]
        batches = [batch for ids, examples in unit.probed for batch, _ in self._batches(ids, examples)]
        base, predicted, real = margins_along(self._model, batches, delta, factors)
        steps = [factor * norm(delta) for factor in factors]
        everything = dict(self._model.named_parameters())
        # The norm of packed four-bit weights means nothing.
        whole = norm(everything) if all(p.is_floating_point() for p in everything.values()) else None
        return Linearity(
            distances=tuple(step / length for step in steps),
            model_distances=tuple(None if whole is None else step / whole for step in steps),
            base=base,
            predicted=predicted,
            real=real,
        )

    def _batches(
        self, label_ids: tuple[tuple[int, ...], ...], examples: Sequence[EncodedExample], shares: Any = None
    ) -> list[tuple[Batch, Tensor | None]]:
        tree = LabelTree.of(label_ids)
        found: list[tuple[Batch, Tensor | None]] = []
        for indices in length_sorted_batches(
            [len(e.prompt_ids) + len(tree.tokens) for e in examples], self._batch_tokens
        ):
            batch = make_batch(
                [examples[i] for i in indices], [tree] * len(indices), len(label_ids), self._pad_id, self._device
            )
            own = (
                None if shares is None else torch.as_tensor(shares[list(indices)], dtype=torch.float32).to(self._device)
            )
            found.append((batch, own))
        return found

    def _to_adapter(self, folder: Path, start: Parameters) -> Delta:
        saved = load_file(folder / "adapter_model.safetensors")
        found = {name.removeprefix("base_model.model."): value for name, value in saved.items()}
        return {name: found[name].to(value.device).float() - value.detach().float() for name, value in start.items()}
