"""How a forward and backward pass is computed: precision by device, activations kept or recomputed, dropout by row."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from ray_ensemble.config import TrainingConfig
from ray_ensemble.errors import InputError
from ray_ensemble.models import lora_layers

_MASK = 2**64 - 1


def autocast(config: TrainingConfig, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """What forward passes run in: bf16 autocast, or the tensors' own types.

    `training.precision: auto` is bf16 on a GPU that has it and fp32 elsewhere. Adapters, gradients and the optimiser's
    state are fp32 in either.

    Raises:
        InputError: bf16 was asked for and the GPU has none.
    """
    has_bf16 = device.type == "cpu" or (
        device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    if config.precision == "bf16" and not has_bf16:
        raise InputError(f"training.precision: {torch.cuda.get_device_name(device)} has no bf16; use fp32 or auto")
    if config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda" and has_bf16):
        return partial(torch.autocast, device.type, dtype=torch.bfloat16)
    return nullcontext


@contextmanager
def activation_checkpointing(model: PeftModel, wanted: bool) -> Iterator[None]:
    """Keep one activation a layer and recompute the others in the backward pass: less memory, a forward pass more.

    Raises:
        InputError: the base cannot.
    """
    if not wanted:
        yield
        return
    base = model.get_base_model()
    if not getattr(base, "supports_gradient_checkpointing", False):
        raise InputError(
            f"training.activation_checkpointing: {type(base).__name__} cannot recompute its activations; set it to false"
        )
    # transformers 5 renamed it on the way.
    verb = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    getattr(base, f"{verb}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(base, f"{verb}_checkpointing_disable")()


@dataclass
class DropoutRows:
    """The rows of the batch that is in the model: a key of each, which its masks are drawn from, and its length."""

    keys: Sequence[int] = ()
    lengths: Sequence[int] = ()


class RowDropout(torch.nn.Module):
    """Dropout whose masks are a function of (row's key, module), not of how rows are batched or what was drawn before.

    So a step's result does not depend on its cut into micro-batches, an adapter's not on those that are trained beside it,
    and a recomputed activation is the one that was dropped.
    """

    def __init__(self, p: float, name: str, rows: DropoutRows) -> None:
        super().__init__()
        self.p = p
        self.key = zlib.crc32(name.encode())
        self.rows = rows
        self._generators: dict[torch.device, torch.Generator] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of x (N, T, …) and scale the others by 1/(1 − p); nothing in eval mode."""
        if not self.training:
            return x
        generator = self._generators.setdefault(x.device, torch.Generator(x.device))
        # Some modules are given their rows flattened to (N·T, …).
        shaped = x.reshape(len(self.rows.keys), -1, x.shape[-1])
        keep = torch.ones(shaped.shape, dtype=torch.bool, device=x.device)
        for n, (key, length) in enumerate(zip(self.rows.keys, self.rows.lengths, strict=True)):
            generator.manual_seed(mix(key, self.key) >> 1)
            drawn = torch.rand(length, x.shape[-1], device=x.device, generator=generator)
            # Padding stands on the left; a module that is given the last columns alone takes the masks of those.
            columns = min(length, shaped.shape[1])
            keep[n, -columns:] = drawn[-columns:] >= self.p
        return (shaped * keep / (1.0 - self.p)).to(x.dtype).view(x.shape)


def mix(*numbers: int) -> int:
    """A 64-bit hash of integers (the finaliser of splitmix64 over each)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


@contextmanager
def row_dropout(model: PeftModel, adapters: Sequence[str]) -> Iterator[DropoutRows]:
    """Let the adapters' dropout draw by row; the yielded object is told the rows of each batch before its pass."""
    rows = DropoutRows()
    replaced: list[tuple[torch.nn.ModuleDict, str, torch.nn.Module]] = []
    for module, layer in lora_layers(model).items():
        for adapter in [name for name in adapters if name in layer.lora_dropout]:
            dropout = layer.lora_dropout[adapter]
            if isinstance(dropout, torch.nn.Dropout) and dropout.p > 0:
                replaced.append((layer.lora_dropout, adapter, dropout))
                layer.lora_dropout[adapter] = RowDropout(dropout.p, module, rows).train(dropout.training)
    try:
        yield rows
    finally:
        for table, adapter, dropout in replaced:
            table[adapter] = dropout.train(table[adapter].training)
