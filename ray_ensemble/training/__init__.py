"""Training adapters: the loop, several adapters on one base, and Ray Train jobs that run them side by side."""

from ray_ensemble.training.budget import task_steps
from ray_ensemble.training.cache import AdapterJob, StartingPoint, TrainedAdapter, job_key
from ray_ensemble.training.jobs import train_adapters
from ray_ensemble.training.learner import TrainingState, learning_rate
from ray_ensemble.training.loop import train_adapter
from ray_ensemble.training.sampling import draw, sample_batch
from ray_ensemble.training.together import AdapterRun, train_together

__all__ = [
    "AdapterJob",
    "AdapterRun",
    "StartingPoint",
    "TrainedAdapter",
    "TrainingState",
    "draw",
    "job_key",
    "learning_rate",
    "sample_batch",
    "task_steps",
    "train_adapter",
    "train_adapters",
    "train_together",
]
