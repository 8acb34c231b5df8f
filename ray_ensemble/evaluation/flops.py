"""Floating-point operations, counted as DESIGN and the papers count them: multiply-adds of matrix products, twice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSize:
    """N, the base's parameters without embedding tables, and the adapter's parameters."""

    backbone: int
    adapter: int


def forward_flops(size: ModelSize, tokens: int, adapters: int = 1) -> float:
    """2·N·tokens, and as much again for the parameters of `adapters` adapters."""
    return 2.0 * (size.backbone + adapters * size.adapter) * tokens


def training_flops(size: ModelSize, tokens: int, validation_tokens: int = 0) -> float:
    """Forward and backward to activations, 2·N·tokens each; the adapter also takes gradients of its weights.

    What early stop validates on goes forward only.
    """
    return 4.0 * size.backbone * tokens + 6.0 * size.adapter * tokens + forward_flops(size, validation_tokens)


def gradient_flops(size: ModelSize, forward_tokens: int, backward_tokens: int, projected: int, signs: int) -> float:
    """The gradient pass: forward, backward to activations, per-example adapter gradients, and their projection.

    Args:
        size: of base and of the adapter's part that gradients are taken of.
        forward_tokens: tokens of all forward passes.
        backward_tokens: tokens of all backward passes (K − 1 a validation example).
        projected: number of gradients projected.
        signs: that every element of a gradient meets: d, or fewer for the Kronecker map.
    """
    passes = 2.0 * size.backbone * (forward_tokens + backward_tokens)
    return passes + 4.0 * size.adapter * backward_tokens + 2.0 * size.adapter * signs * projected


def flops_ratio(parts: dict[str, float], qlora_all: float) -> float:
    """(gradients + search + groups + boosting + ensemble + merging) / one adapter on all, as many steps and examples."""
    return sum(parts.values()) / qlora_all
