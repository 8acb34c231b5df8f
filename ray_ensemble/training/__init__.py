"""Training adapters: the loop, and Ray Train jobs that run it side by side."""

from ray_ensemble.training.budget import task_steps
from ray_ensemble.training.jobs import AdapterJob, StartingPoint, TrainedAdapter, job_key, train_adapters
from ray_ensemble.training.loop import TrainingState, learning_rate, sample_batch, train_adapter

__all__ = [
    "AdapterJob",
    "StartingPoint",
    "TrainedAdapter",
    "TrainingState",
    "job_key",
    "learning_rate",
    "sample_batch",
    "task_steps",
    "train_adapter",
    "train_adapters",
]
