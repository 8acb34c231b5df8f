"""Per-example LoRA gradients, randomly projected, collected by Ray actors into a store."""

from ray_ensemble.gradients.replicas import GradientPass, collect_gradients
from ray_ensemble.gradients.store import GradientStore, StoredGradients, damage, split_folder
from ray_ensemble.gradients.units import ReplicaSpec

__all__ = [
    "GradientPass",
    "GradientStore",
    "ReplicaSpec",
    "StoredGradients",
    "collect_gradients",
    "damage",
    "split_folder",
]
