"""What a run achieved and what it cost: metrics with intervals, baselines side by side, floating-point operations."""

from ray_ensemble.evaluation.flops import ModelSize, flops_ratio, forward_flops, gradient_flops, training_flops
from ray_ensemble.evaluation.metrics import losses_and_hits, metric, paired_difference
from ray_ensemble.evaluation.summary import summarise

__all__ = [
    "ModelSize",
    "flops_ratio",
    "forward_flops",
    "gradient_flops",
    "losses_and_hits",
    "metric",
    "paired_difference",
    "summarise",
    "training_flops",
]
