"""One prediction from many adapters: weights per dataset, inference on one base, and merging into one adapter."""

from ray_ensemble.ensemble.merge import VLLM_RANKS, Merged, merge_adapters
from ray_ensemble.ensemble.prediction import PredictedTask, Predictor, Request, ensemble_parts
from ray_ensemble.ensemble.scoring import Scored, ScoreRequest, score_all
from ray_ensemble.ensemble.weights import (
    best_step,
    booster_scores,
    boosters_of,
    combine,
    fit_step_size,
    fit_weights,
    label_losses,
)

__all__ = [
    "VLLM_RANKS",
    "Merged",
    "PredictedTask",
    "Predictor",
    "Request",
    "ScoreRequest",
    "Scored",
    "best_step",
    "booster_scores",
    "boosters_of",
    "combine",
    "ensemble_parts",
    "fit_step_size",
    "fit_weights",
    "label_losses",
    "merge_adapters",
    "score_all",
]
