"""FLOPs ratio of an arm of `classify10.py` if training were longer and fewer training examples had gradients: counted, not run.

Training costs what its steps cost here, times the steps. The gradient pass costs what its tokens cost, which the gradient
store tells for every split. Everything else (common start, search, weights, boosters, merging) does not depend on either.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from classify10_experiment import Experiment

from ray_ensemble.files import read_json
from ray_ensemble.training import task_steps

SPLITS = ("train", "validation")  # those that have gradients


def counted(experiment: Experiment) -> bool:
    """Whether the gradient store tells what the pass cost: not in a folder that only has records from another."""
    return all(_info(experiment, name, split).exists() for name in experiment.names for split in SPLITS)


def pass_flops(experiment: Experiment, share: float | None = None) -> float:
    """Operations of the gradient pass if `share` of each training split had gradients (by default as many examples as had them),
    and all of validation.
    """
    job, forward, backward, projected = experiment.job, 0.0, 0.0, 0.0
    for name, examples in zip(experiment.names, experiment.examples, strict=True):
        for split in SPLITS:
            info = read_json(_info(experiment, name, split), "gradient split")
            part = 1.0 if share is None or split == "validation" else share * examples / info["examples"]
            forward += part * info["forward_tokens"]
            backward += part * info["backward_tokens"]
            # Every example has as many backward passes as it has targets, each over its own tokens.
            projected += part * info["examples"] * info["backward_tokens"] / info["forward_tokens"]
    return job.gradient_pass_flops(round(forward), round(backward), round(projected))


def flops_at(
    experiment: Experiment, arm: Mapping[str, Any], qlora_all: Mapping[str, Any], epochs: float, share: float
) -> tuple[dict[str, float], float]:
    """FLOPs of an arm of ours by part, and of one QLoRA on all, both trained for `epochs` after the common start.

    Args:
        experiment: its job's gradients are there.
        arm: cost record of an arm that takes gradients and trains groups.
        qlora_all: cost record of one QLoRA on all with the same seed.
        epochs: passes over all training data after the common start.
        share: of each training split that has gradients, above 0 and at most 1.
    """
    training = experiment.config.training.model_copy(update={"epochs": epochs})
    here, there = sum(experiment.shares.values()), sum(task_steps(experiment.examples, training))
    one = sum(qlora_all["flops"].values()) * (experiment.warm_up + there) / (experiment.warm_up + here)
    parts = dict(arm["flops"])
    parts["groups"] *= there / here
    parts["gradients"] -= pass_flops(experiment) - pass_flops(experiment, share)
    return parts, one


def _info(experiment: Experiment, task: str, split: str) -> Path:
    return experiment.job.folder / "gradients" / task / split / "info.json"
