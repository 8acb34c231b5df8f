"""A run folder as the ensemble stage leaves it, put together by hand: random adapters, no training and no Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import write_job

from ray_ensemble.config import AdapterConfig, dump_config, load_config
from ray_ensemble.ensemble import merge_adapters
from ray_ensemble.files import write_json
from ray_ensemble.models import backbone_parameters, draw_initial_adapter, load_base

CPU = torch.device("cpu")
WEIGHTS = {
    "films": [0.6, 0.4, 0.0, 0.0],
    "phones": [0.0, 0.0, 1.0, 0.0],
    "contrary": [0.1, 0.2, 0.3, 0.4],
    "options": [0.0, 0.5, 0.0, 0.5],
}
SCALES = {"films": 1.6, "phones": 0.3, "contrary": 0.4, "options": 1.0}
BOOSTING = {
    "boosters": {"films": ["booster-0", "booster-1"], "options": ["booster-1"]},
    "step_sizes": {"films": 0.7, "options": 1.3},
}


def moved(source: Path, folder: Path, seed: int, scale: float = 0.05) -> Path:
    """A copy of an adapter with its factors moved at random."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(source / "adapter_model.safetensors")
    folder.mkdir(parents=True)
    changed = {name: value + scale * torch.randn(value.shape, generator=generator) for name, value in tensors.items()}
    save_file(changed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    return folder


def write_run(
    folder: Path, model: Path, tasks: Path, *, quantization: str = "none", warm: bool = False, **changes: Any
) -> Path:
    """Four tasks, four groups' adapters, and two boosters of another rank.

    Args:
        folder: the run folder; it must not be there.
        model: the base.
        tasks: the folder of task folders.
        quantization: `none` or `nf4`.
        warm: whether the run starts at a trained θ₀, which then has a quarter of the weight in two datasets' ensembles.
        changes: sections of the job.
    """
    folder.mkdir()
    settings = {"gradients": {"batch_tokens": 256, "start": "meta" if warm else "fresh"}, **changes}
    config = load_config(write_job(folder, model, tasks, **settings))
    (folder / "config.yaml").write_text(dump_config(config))
    described = [json.loads((path / "task.json").read_text()) for path in sorted(tasks.iterdir())]
    write_json(folder / "tasks.json", {"tasks": described})
    base = load_base(model, "none", CPU)
    plan = {"quantization": quantization, "pad_id": 0, "backbone_parameters": backbone_parameters(base)}
    write_json(folder / "plan.json", {"model": plan, "adapter": {"parameters": {"lora_A": 768, "lora_B": 512}}})
    draw_initial_adapter(base, config.adapter, folder / "init")
    draw_initial_adapter(base, AdapterConfig(rank=3, alpha=8, seed=1, rank_stabilized=True), folder / "wide")
    start = moved(folder / "init", folder / "start", 9) if warm else folder / "init"
    for g in range(4):
        moved(start, folder / "adapters" / f"group-{g}", g)
    for b in range(2):
        moved(folder / "wide", folder / "boosters" / f"booster-{b}", 10 + b)
    names, weights = [f"group-{g}" for g in range(4)], WEIGHTS
    folders = [folder / "adapters" / name for name in names]
    if warm:
        shares = {"films": 0.25, "contrary": 0.25, "phones": 0.0, "options": 0.0}
        weights = {task: [*((1 - shares[task]) * w for w in found), shares[task]] for task, found in WEIGHTS.items()}
        names, folders = [*names, "start"], [*folders, start]
    write_json(
        folder / "ensemble.json", {"adapters": names, "weights": weights, "scales": SCALES, "boosting": BOOSTING}
    )
    for task, found in weights.items():
        merge_adapters(folders, found, folder / "merged" / task)
    write_json(folder / "manifests" / "ensemble.json", {"stage": "ensemble", "files": {}})
    return folder
