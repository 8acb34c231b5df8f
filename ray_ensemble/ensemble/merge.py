"""Merging: the weighted ensemble of a dataset as one adapter, which costs one forward pass."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from scipy.special import log_softmax
from torch import Tensor

from ray_ensemble.errors import InputError
from ray_ensemble.files import whole_folder
from ray_ensemble.models import lora_scaling, read_plain_lora

# What vLLM takes as --max-lora-rank (vllm.config.lora.MaxLoRARanks, 0.14): an adapter needs one that is not below its rank.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

# How far a merged adapter goes from a dataset's main adapter alone to the ensemble's combination: what is tried.
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Merged:
    """Rank of a merged adapter, and the share of the combined update's squared Frobenius norm, of all modules, that it has."""

    rank: int
    norm_kept: float

    @property
    def vllm_max_lora_rank(self) -> int | None:
        """The least `--max-lora-rank` with which vLLM serves it; None if vLLM cannot."""
        return next((allowed for allowed in VLLM_RANKS if allowed >= self.rank), None)


def merge_adapters(folders: Sequence[Path], weights: Sequence[float], target: Path, rank: int | None = None) -> Merged:
    """Write Σ_g w_g s_g B_g A_g as one PEFT adapter: A's stacked, B's side by side with weight and scaling folded in.

    The combination of updates is exact for plain LoRA of any ranks and alphas (PEFT calls it "cat"), unless `rank` is less
    than the sum of ranks. That the merged model behaves as the ensemble of scores holds to first order only, so evaluation
    measures the difference.

    A booster counts by its difference from the start, s_b − s_θ₀: its weight is η, and θ₀'s is −η for each booster. At a fresh
    start θ₀ adds nothing and can be left out.

    Args:
        folders: saved adapters of one base and the same target modules.
        weights: one for each; adapters of weight zero are left out.
        target: the folder to write, whole or not at all.
        rank: the most that the result may have. A larger sum is cut to the nearest update of that rank, module by module
            (`truncate`); by default nothing is.

    Raises:
        InputError: the adapters do not fit together or are not plain LoRA.
    """
    used = [(Path(folder), weight) for folder, weight in zip(folders, weights, strict=True) if weight != 0]
    if not used:
        raise InputError(f"{target}: nothing to merge, every weight is zero")
    read = [read_plain_lora(folder) for folder, _ in used]
    configs, tensors = [config for config, _ in read], [found for _, found in read]
    if any(set(t) != set(tensors[0]) for t in tensors):
        raise InputError(f"{used[0][0].parent}: these adapters adapt different modules and cannot be merged")
    total = sum(int(config["r"]) for config in configs)
    folded = [weight * lora_scaling(config) for (_, weight), config in zip(used, configs, strict=True)]
    merged: dict[str, Tensor] = {}
    kept = whole = 0.0
    for name in tensors[0]:
        if ".lora_A." not in name:
            continue
        a_name, b_name = name, name.replace(".lora_A.", ".lora_B.")
        a = torch.cat([t[a_name] for t in tensors], dim=0)  # (Σr, in)
        b = torch.cat([t[b_name] * factor for t, factor in zip(tensors, folded, strict=True)], dim=1)  # (out, Σr)
        if rank is not None and rank < total:
            b, a, squares = truncate(b, a, rank)
            kept, whole = kept + float(squares[:rank].sum()), whole + float(squares.sum())
        merged[a_name], merged[b_name] = a.contiguous(), b.contiguous()
    done = Merged(total if rank is None else min(rank, total), kept / whole if whole else 1.0)
    # Scaling is folded into B: alpha = rank makes the result's own scaling 1; rank-stabilised scaling must be off for that.
    result = {**configs[0], "r": done.rank, "lora_alpha": done.rank, "use_rslora": False, "inference_mode": True}
    with whole_folder(target) as temporary:
        save_file(merged, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        (temporary / "adapter_config.json").write_text(json.dumps(result, indent=2) + "\n")
    return done


def towards(parts: Mapping[str | None, float], main: str, share: float) -> dict[str | None, float]:
    """Coefficients on the way from one adapter alone (`share` 0) to a combination of adapters (1); zeros are left out."""
    found = {name: share * coefficient for name, coefficient in parts.items()}
    found[main] = found.get(main, 0.0) + 1.0 - share
    return {name: coefficient for name, coefficient in found.items() if coefficient}


def divergence(wanted: NDArray[np.floating[Any]], found: NDArray[np.floating[Any]]) -> float:
    """Mean Kullback-Leibler divergence KL(p ‖ q) over examples, in nats, of predictions q from predictions p.

    Labels are not needed, and it tells two models apart on far fewer examples than the difference of their losses.

    Args:
        wanted: (V, K) label scores whose softmax is p.
        found: (V, K) those of q.
    """
    p, q = log_softmax(wanted.astype(np.float64), axis=1), log_softmax(found.astype(np.float64), axis=1)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def truncate(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The update of at most `rank` that is nearest to B·A in the Frobenius norm, without forming B·A (Eckart and Young 1936).

    B = Q_b R_b and Aᵀ = Q_a R_a, so that the singular values of B·A are those of the small R_b R_aᵀ = U·diag(σ)·Vᵀ; B becomes
    Q_b U √σ and A becomes √σ Vᵀ Q_aᵀ.

    Args:
        b: (out, R).
        a: (R, in).
        rank: k < R.

    Returns:
        (out, k) and (k, in) of the input's dtype, with zeros where the module is smaller than k; and all σ² float64.
    """
    left, upper = torch.linalg.qr(b.double())
    right, lower = torch.linalg.qr(a.double().T)
    u, sigma, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    root = sigma[:rank].sqrt()
    missing = rank - len(root)
    new_b = torch.nn.functional.pad(left @ u[:, :rank] * root, (0, missing))
    new_a = torch.nn.functional.pad(root[:, None] * (v[:rank] @ right.T), (0, 0, 0, missing))
    return new_b.to(b.dtype), new_a.to(a.dtype), sigma**2
