"""Per-example LoRA gradients of margins, one backward pass for a whole batch, projected module by module.

For an adapted linear map with input x and output gradient δ of an example, ∇B = s·δᵀ(xAᵀ) and ∇A = s·(δB)ᵀx, s the LoRA
scaling: both follow from a forward hook and a hook on the output's gradient, so no loop over examples is needed. At a fresh
start B = 0, hence ∇A = 0 exactly and the adapter leaves the forward pass alone: only B's half is computed, on the bare base.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from ray_ensemble.gradients.projection import Projection
from ray_ensemble.models.adapters import lora_layers, refuse_unsupported
from ray_ensemble.models.scoring import Batch, label_scores, margins


@dataclass(frozen=True)
class MarginFeatures:
    """Training examples: margins f₀ (N,), and φ = Pᵀ∇f (N, d)."""

    margins: Tensor
    features: Tensor


@dataclass(frozen=True)
class ClassFeatures:
    """Validation examples: raw scores s (N, K), and Pᵀ∇(s_k − s_0) (N, K, d), whose first class is zero."""

    scores: Tensor
    features: Tensor


class GradientCollector:
    """Hooks on the adapted layers of a model that turn one backward pass into projected per-example gradients.

    Args:
        model: a PEFT model with one plain LoRA adapter, in eval mode.
        projection: the map φ = Pᵀg.

    Raises:
        InputError: the adapter is of a kind whose gradient is not that of plain LoRA.
    """

    def __init__(self, model: PeftModel, projection: Projection) -> None:
        self._model = model
        self._projection = projection
        self._adapter = model.active_adapter
        refuse_unsupported(model, self._adapter)
        model.requires_grad_(False)
        self._layers = lora_layers(model)
        self.fresh = all(not self._b(layer).any() for layer in self._layers.values())
        self.tokens_forward = 0
        self.tokens_backward = 0
        self._rows: Tensor | None = None
        self._examples = 0
        self._sink: Tensor | None = None

    def margin_features(self, batch: Batch) -> MarginFeatures:
        """Margins and their projected gradients, by one forward and one backward pass."""
        with self._capture(batch):
            scores = label_scores(self._model, batch)
            value = margins(scores, batch.labels)
            features = self._backward(value.sum(), batch, retain=False)
        return MarginFeatures(value.detach(), features)

    def class_features(self, batch: Batch) -> ClassFeatures:
        """Scores and the projected gradients of their differences to label 0: one forward and K − 1 backward passes."""
        parts = [torch.zeros(batch.size, self._projection.dim, device=batch.labels.device)]
        with self._capture(batch):
            scores = label_scores(self._model, batch)
            for k in range(1, batch.classes):
                difference = (scores[:, k] - scores[:, 0]).sum()
                parts.append(self._backward(difference, batch, retain=k + 1 < batch.classes))
        return ClassFeatures(scores.detach(), torch.stack(parts, dim=1))

    def _b(self, layer: LoraLayer) -> Tensor:
        weight: Tensor = layer.lora_B[self._adapter].weight
        return weight

    def _backward(self, value: Tensor, batch: Batch, retain: bool) -> Tensor:
        sink = torch.zeros(batch.size, self._projection.dim, device=value.device)
        self._sink = sink
        value.backward(retain_graph=retain)  # type: ignore[no-untyped-call]
        self._sink = None
        self.tokens_backward += batch.tokens
        return sink

    @contextmanager
    def _capture(self, batch: Batch) -> Iterator[None]:
        self._rows = batch.row_example if batch.row_example.shape[0] != batch.size else None
        self._examples = batch.size
        handles = [layer.register_forward_hook(self._forward_hook(name, layer)) for name, layer in self._layers.items()]
        try:
            # At B = 0 the adapter adds nothing to the forward pass and nothing to the gradients that flow back.
            with self._model.disable_adapter() if self.fresh else nullcontext():
                self.tokens_forward += batch.tokens
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _forward_hook(self, name: str, layer: LoraLayer):  # type: ignore[no-untyped-def]
        a = layer.lora_A[self._adapter].weight  # (r, in)
        b = self._b(layer)  # (out, r)
        scaling = float(layer.scaling[self._adapter])

        def hook(_: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0].detach().to(a.dtype)
            down = x @ a.T  # (R, T, in) @ (in, r)
            if not output.requires_grad:
                # The lowest adapted layer: gradients need not flow below it.
                output = output.detach().requires_grad_(True)

            def on_gradient(delta: Tensor) -> None:
                delta = delta.to(a.dtype)
                gradient_b = torch.bmm(delta.transpose(1, 2), down)  # (R, out, T) @ (R, T, r)
                self._add(f"{name}.lora_B.weight", gradient_b * scaling)
                if not self.fresh:
                    up = delta @ b  # (R, T, out) @ (out, r)
                    self._add(
                        f"{name}.lora_A.weight", torch.bmm(up.transpose(1, 2), x) * scaling
                    )  # (R, r, T) @ (R, T, in)

            output.register_hook(on_gradient)  # type: ignore[no-untyped-call]
            return output

        return hook

    def _add(self, name: str, rows: Tensor) -> None:
        """Sum a module's gradients over each example's rows, project them, and add them to the features."""
        assert self._sink is not None
        flat = rows.flatten(1)
        if self._rows is not None:
            flat = torch.zeros(self._examples, flat.shape[1], device=flat.device, dtype=flat.dtype).index_add_(
                0, self._rows, flat
            )
        self._sink += self._projection.apply(name, flat)
