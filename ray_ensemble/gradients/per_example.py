"""Per-example LoRA gradients of margins, one backward pass for a whole batch, projected parameter by parameter.

For an adapted linear map with input x and output gradient δ of an example, ∇B = s·δᵀ(xAᵀ) and ∇A = s·(δB)ᵀx, s the LoRA
scaling: both follow from a forward hook and a hook on the output's gradient, so no loop over examples is needed. At a fresh
start B = 0, hence ∇A = 0 exactly and the adapter leaves the forward pass alone: only B's half is computed, on the bare base.

A parameter's gradients of several batches wait in a `ProjectionBuffer` of bounded size, so that each sign of the projection
is made once for many examples; the concatenated D-vector of an example never exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from ray_ensemble.errors import InputError
from ray_ensemble.models.adapters import lora_layers, refuse_unsupported
from ray_ensemble.models.scoring import Batch, label_scores, margins

Kind = Literal["margin", "classes"]  # one gradient an example, or one for each label but the first

BUFFER_BYTES = 64 << 20


class LinearMap(Protocol):
    """What gradients are mapped by: a projection, or anything else that is linear and adds up over parameters."""

    dim: int

    def apply(self, name: str, gradients: Tensor) -> Tensor:
        """(N, p, q) gradients of the parameter `name` -> its (N, dim) share."""


@dataclass(frozen=True)
class Collected:
    """Base scores s (N, K) and projected gradients of N examples.

    `features` is (N, d) of the margins, φ = Pᵀ∇f, or (N, K, d) of the differences Pᵀ∇(s_k − s_0), whose first class is
    zero. `margins` (N,) are f₀.
    """

    scores: Tensor
    margins: Tensor
    features: Tensor


class ProjectionBuffer:
    """Gradients that wait to be projected, and the features that they add up to.

    Args:
        projection: the map φ = Pᵀg.
        slots: number of feature rows.
        capacity: bytes of gradients held at most before they are projected.
    """

    def __init__(self, projection: LinearMap, slots: int, device: torch.device, capacity: int = BUFFER_BYTES) -> None:
        self._projection = projection
        self._capacity = capacity
        self._waiting: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._bytes = 0
        self._features = torch.zeros(slots, projection.dim, device=device)

    def add(self, name: str, slots: Tensor, gradients: Tensor) -> None:
        """Take a parameter's gradients (N, p, q), which belong to the feature rows `slots` (N,)."""
        self._waiting.setdefault(name, []).append((slots, gradients))
        self._bytes += gradients.nbytes
        if self._bytes > self._capacity:
            self._flush()

    def features(self) -> Tensor:
        """The features (slots, d) float32 of all that was added."""
        self._flush()
        return self._features

    def _flush(self) -> None:
        for name, parts in self._waiting.items():
            slots = torch.cat([slots for slots, _ in parts])
            gradients = torch.cat([gradients for _, gradients in parts]) if len(parts) > 1 else parts[0][1]
            self._features.index_add_(0, slots, self._projection.apply(name, gradients))
        self._waiting.clear()
        self._bytes = 0


@dataclass
class Capture:
    """Where the gradients of one forward pass go: a buffer, and the feature row of each example (N,).

    `slots` moves on between the backward passes of one forward pass, one for each label.
    """

    buffer: ProjectionBuffer
    slots: Tensor


class GradientCollector:
    """Hooks on the adapted layers of a model that turn one backward pass into projected per-example gradients.

    Args:
        model: a PEFT model with one plain LoRA adapter, in eval mode; or a shard of one (`models.shard`).
        projection: the map φ = Pᵀg.

    Raises:
        InputError: the adapter is of a kind whose gradient is not that of plain LoRA.
    """

    def __init__(self, model: PeftModel, projection: LinearMap, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._model = model
        self._projection = projection
        self._buffer_bytes = buffer_bytes
        self._adapter = model.active_adapter
        refuse_unsupported(model, self._adapter)
        model.requires_grad_(False)
        self._layers = lora_layers(model)
        self.fresh = all(not self._b(layer).any() for layer in self._layers.values())
        self.tokens_forward = 0
        self.tokens_backward = 0

    def collect(self, batches: Sequence[Batch], kind: Kind) -> Collected:
        """Scores, margins and projected gradients of the examples of some batches, in their order.

        A batch takes one forward pass, and one backward pass (`margin`) or K − 1 of them (`classes`).
        """
        size = sum(batch.size for batch in batches)
        per_example = 1 if kind == "margin" else batches[0].classes
        device = batches[0].labels.device
        buffer = self.buffer(size * per_example, device)
        scores, values = [], []
        first = 0
        for batch in batches:
            slots = torch.arange(first, first + batch.size, device=device) * per_example
            capture = Capture(buffer, slots)
            with self.capturing(capture, batch):
                s = label_scores(self._model, batch)
            f = margins(s, batch.labels)
            if kind == "margin":
                self.backward(f.sum(), batch)
            for k in range(1, per_example):
                capture.slots = slots + k
                self.backward((s[:, k] - s[:, 0]).sum(), batch, retain=k + 1 < per_example)
            scores.append(s.detach())
            values.append(f.detach())
            first += batch.size
        features = buffer.features()
        if kind == "classes":
            features = features.view(size, per_example, self._projection.dim)
        return Collected(torch.cat(scores), torch.cat(values), features)

    def buffer(self, slots: int, device: torch.device) -> ProjectionBuffer:
        """A buffer for `slots` feature rows."""
        return ProjectionBuffer(self._projection, slots, device, self._buffer_bytes)

    def backward(self, value: Tensor, batch: Batch, gradient: Tensor | None = None, retain: bool = False) -> None:
        """Let the gradients of `value` flow to the captures of its forward pass."""
        value.backward(gradient, retain_graph=retain)  # type: ignore[no-untyped-call]
        self.tokens_backward += batch.tokens

    @contextmanager
    def capturing(self, capture: Capture, batch: Batch) -> Iterator[None]:
        """A forward pass within this block sends its examples' gradients, once they flow back, to `capture`."""
        handles = [
            layer.register_forward_hook(self._forward_hook(name, layer, capture, batch.input_ids.shape))
            for name, layer in self._layers.items()
        ]
        try:
            # At B = 0 the adapter adds nothing to the forward pass and nothing to the gradients that flow back.
            with self._model.disable_adapter() if self.fresh else nullcontext():
                yield
            self.tokens_forward += batch.tokens
        finally:
            for handle in handles:
                handle.remove()

    def _b(self, layer: LoraLayer) -> Tensor:
        weight: Tensor = layer.lora_B[self._adapter].weight
        return weight

    def _forward_hook(self, name: str, layer: LoraLayer, capture: Capture, shape: torch.Size):  # type: ignore[no-untyped-def]
        a = layer.lora_A[self._adapter].weight  # (r, in)
        b = self._b(layer)  # (out, r)
        scaling = float(layer.scaling[self._adapter])

        def hook(_: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = _by_example(inputs[0].detach(), shape, name).to(a.dtype)
            down = x @ a.T  # (N, T, in) @ (in, r)
            if not output.requires_grad:
                # The lowest adapted layer: gradients need not flow below it. A copy, since some families go on in place.
                output = output.detach().requires_grad_(True).clone()

            def on_gradient(delta: Tensor) -> None:
                delta = _by_example(delta, shape, name).to(a.dtype)
                gradient_b = torch.bmm(delta.transpose(1, 2), down)  # (N, out, T) @ (N, T, r)
                capture.buffer.add(f"{name}.lora_B.weight", capture.slots, gradient_b.mul_(scaling))
                if not self.fresh:
                    up = delta @ b  # (N, T, out) @ (out, r)
                    gradient_a = torch.bmm(up.transpose(1, 2), x)  # (N, r, T) @ (N, T, in)
                    capture.buffer.add(f"{name}.lora_A.weight", capture.slots, gradient_a.mul_(scaling))

            output.register_hook(on_gradient)  # type: ignore[no-untyped-call]
            return output

        return hook


def _by_example(t: Tensor, shape: torch.Size, name: str) -> Tensor:
    """A module's input or output as (N, T, ·): some families lay a batch's tokens end to end."""
    if t.dim() == 3 and t.shape[0] == shape[0]:
        return t
    if t.dim() == 2 and t.shape[0] == shape.numel():
        return t.view(*shape, -1)
    raise InputError(
        f"adapter.target_modules: {name} gets its tokens as {tuple(t.shape)} from a batch of {tuple(shape)}, so it cannot be "
        "told which example they belong to (experts that tokens are sent to, for instance); leave it out"
    )
