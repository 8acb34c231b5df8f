"""Many LoRA adapters on one base, for inference: every row of a batch takes its own adapter.

The base's products are computed once for the whole batch. What the adapters add, s·B·A·x, is batched over adapters of one rank
that have equally many rows, so that its cost does not depend on which other adapters are loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from ray_ensemble.errors import InputError
from ray_ensemble.files import read_json

_PREFIX = "base_model.model."

Factors = dict[str, tuple[Tensor, Tensor]]  # module -> Aᵀ (in, r) and s·Bᵀ (r, out)


def lora_scaling(config: Mapping[str, Any]) -> float:
    """The scaling s of an adapter's update s·B·A, from its `adapter_config.json`."""
    rank = float(config["r"])
    return float(config["lora_alpha"]) / (rank**0.5 if config.get("use_rslora") else rank)


def read_plain_lora(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a saved adapter.

    Raises:
        InputError: it is missing, damaged, or not plain LoRA.
    """
    config = read_json(folder / "adapter_config.json", "adapter configuration")
    patterns = config.get("rank_pattern") or config.get("alpha_pattern")
    if config.get("use_dora") or config.get("lora_bias") or config.get("bias", "none") != "none" or patterns:
        raise InputError(
            f"{folder}: not plain LoRA; adapters with DoRA, biases, rank or alpha patterns cannot be merged or combined"
        )
    try:
        return config, load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot load this adapter ({' '.join(str(error).split())[:200]})") from None


class MixedAdapters:
    """Adapters of one base, applied by row, in one process and one thread.

    Args:
        base: the base itself, not wrapped by PEFT; in NF4 or not. Its adapted modules get a hook.
        folders: saved plain LoRA adapters by name, of any ranks.

    Raises:
        InputError: an adapter is missing, damaged, not plain LoRA, or not of this base.
    """

    def __init__(self, base: PreTrainedModel, folders: Mapping[str, Path]) -> None:
        self._modules = dict(base.named_modules())
        # As the base computes: fp32 on a CPU, bf16 on a GPU.
        self._as_base: dict[str, Any] = {"device": base.device, "dtype": base.dtype}
        self._adapters = {name: self._load(folder) for name, folder in folders.items()}
        shapes = {name: tuple((m, a.shape) for m, (a, _) in found.items()) for name, found in self._adapters.items()}
        kinds = {shape: kind for kind, shape in enumerate(dict.fromkeys(shapes.values()))}
        self._kinds: dict[str | None, int] = {None: -1, **{name: kinds[shape] for name, shape in shapes.items()}}
        self._blocks: list[_Block] = []
        self._rows = 0
        for name in sorted({module for factors in self._adapters.values() for module in factors}):
            self._modules[name].register_forward_hook(partial(self._add, name))

    def order(self, names: Sequence[str | None]) -> list[int]:
        """Places in `names` in the order that rows must come in: those of one adapter together, like adapters side by side."""
        counts = Counter(names)
        return sorted(
            range(len(names)), key=lambda row: (self._kinds[names[row]], counts[names[row]], names[row] or "")
        )

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within it, row i of every batch takes adapter `names[i]`, None being the bare base; `names` are in `order`."""
        runs = [(name, len(list(found))) for name, found in groupby(names)]
        if len({name for name, _ in runs}) != len(runs):
            raise ValueError("rows of one adapter must stand together: bring them into `order`")
        first = 0
        for (kind, size), members in groupby(runs, key=lambda run: (self._kinds[run[0]], run[1])):
            alike = [self._adapters[name] for name, _ in members if name is not None]
            count = max(1, len(alike)) * size
            if kind >= 0:
                self._blocks.append(_Block.of(slice(first, first + count), alike))
            first += count
        self._rows = len(names)
        try:
            yield
        finally:
            self._blocks = []

    def _add(self, module: str, _: torch.nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        """Add to a module's output y (N, T, out) what the rows' adapters make of its input x (N, T, in)."""
        for block in self._blocks:
            if module in block.factors:
                a, b = block.factors[module]
                # Some modules are given their rows flattened to (N·T, in).
                x = arguments[0].reshape(self._rows, -1, a.shape[1])[block.rows].reshape(len(a), -1, a.shape[1])
                y = output.view(self._rows, -1, b.shape[2])[block.rows].view(len(b), -1, b.shape[2])
                y.baddbmm_(torch.bmm(x, a), b)  # (m, n·T, in) @ (m, in, r) @ (m, r, out)

    def _load(self, folder: Path) -> Factors:
        config, tensors = read_plain_lora(folder)
        scaling, found = lora_scaling(config), {}
        for key in sorted(tensors):
            name, a_half, _ = key.removeprefix(_PREFIX).rpartition(".lora_A.")
            if not a_half:
                continue
            if name not in self._modules:
                raise InputError(f"{folder}: this adapter is of another base (this one has no module {name})")
            b = scaling * tensors[key.replace(".lora_A.", ".lora_B.")]
            found[name] = (tensors[key].to(**self._as_base).T, b.to(**self._as_base).T)
        return found


@dataclass(frozen=True)
class _Block:
    """Rows of m adapters of one kind, n rows each, one adapter after the other; Aᵀ (m, in, r) and s·Bᵀ (m, r, out) by module."""

    rows: slice
    factors: Factors

    @classmethod
    def of(cls, rows: slice, adapters: Sequence[Factors]) -> _Block:
        return cls(
            rows,
            {
                module: (torch.stack([f[module][0] for f in adapters]), torch.stack([f[module][1] for f in adapters]))
                for module in adapters[0]
            },
        )
