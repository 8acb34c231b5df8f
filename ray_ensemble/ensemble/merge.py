"""Merging: the weighted ensemble of a dataset as one adapter of summed rank, which costs one forward pass."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ray_ensemble.errors import InputError
from ray_ensemble.files import read_json, whole_folder


def merge_adapters(folders: Sequence[Path], weights: Sequence[float], target: Path) -> None:
    """Write Σ_g w_g s_g B_g A_g as one PEFT adapter: A's stacked, B's side by side with weight and scaling folded in.

    The combination of updates is exact for plain LoRA of any ranks and alphas (PEFT calls it "cat"). That the merged model
    behaves as the ensemble of scores holds to first order only, so evaluation measures the difference.

    A booster counts by its difference from the start, s_b − s_θ₀: its weight is η, and θ₀'s is −η for each booster. At a fresh
    start θ₀ adds nothing and can be left out.

    Args:
        folders: saved adapters of one base and the same target modules.
        weights: one for each; adapters of weight zero are left out.
        target: the folder to write, whole or not at all.

    Raises:
        InputError: the adapters do not fit together or are not plain LoRA.
    """
    used = [(Path(folder), weight) for folder, weight in zip(folders, weights, strict=True) if weight != 0]
    if not used:
        raise InputError(f"{target}: nothing to merge, every weight is zero")
    configs = [read_json(folder / "adapter_config.json", "adapter configuration") for folder, _ in used]
    for (folder, _), config in zip(used, configs, strict=True):
        patterns = config.get("rank_pattern") or config.get("alpha_pattern")
        if config.get("use_dora") or config.get("lora_bias") or config.get("bias", "none") != "none" or patterns:
            raise InputError(f"{folder}: only plain LoRA adapters without biases, rank or alpha patterns can be merged")
    tensors = [load_file(folder / "adapter_model.safetensors") for folder, _ in used]
    if any(set(t) != set(tensors[0]) for t in tensors):
        raise InputError(f"{used[0][0].parent}: these adapters adapt different modules and cannot be merged")
    merged: dict[str, torch.Tensor] = {}
    for name in tensors[0]:
        if ".lora_A." in name:
            merged[name] = torch.cat([t[name] for t in tensors], dim=0).contiguous()  # (Σr, in)
        else:
            parts = [
                t[name] * (weight * _scaling(config))
                for t, (_, weight), config in zip(tensors, used, configs, strict=True)
            ]
            merged[name] = torch.cat(parts, dim=1).contiguous()  # (out, Σr)
    rank = sum(int(config["r"]) for config in configs)
    # Scaling is folded into B: alpha = rank makes the result's own scaling 1; rank-stabilised scaling must be off for that.
    result = {**configs[0], "r": rank, "lora_alpha": rank, "use_rslora": False, "inference_mode": True}
    with whole_folder(target) as temporary:
        save_file(merged, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        (temporary / "adapter_config.json").write_text(json.dumps(result, indent=2) + "\n")


def _scaling(config: dict[str, float]) -> float:
    rank = float(config["r"])
    return float(config["lora_alpha"]) / (rank**0.5 if config.get("use_rslora") else rank)
