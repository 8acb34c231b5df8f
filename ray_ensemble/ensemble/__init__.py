"""One prediction from many adapters: weights per dataset, inference on one base, and merging into one adapter."""

from ray_ensemble.ensemble.merge import SHARES, VLLM_RANKS, Merged, divergence, merge_adapters, towards
from ray_ensemble.ensemble.prediction import PredictedTask, Predictor, Request, ensemble_parts
from ray_ensemble.ensemble.scoring import Scored, ScoreRequest, score_all
from ray_ensemble.ensemble.weights import (
    add_up,
    best_step,
    booster_scores,
    boosters_of,
    coefficients,
    combine,
    label_losses,
    learn_step_sizes,
    learn_weights,
    scale_of,
)

__all__ = [
    "SHARES",
    "VLLM_RANKS",
    "Merged",
    "PredictedTask",
    "Predictor",
    "Request",
    "ScoreRequest",
    "Scored",
    "add_up",
    "best_step",
    "booster_scores",
    "boosters_of",
    "coefficients",
    "combine",
    "divergence",
    "ensemble_parts",
    "label_losses",
    "learn_step_sizes",
    "learn_weights",
    "merge_adapters",
    "scale_of",
    "score_all",
    "towards",
]
