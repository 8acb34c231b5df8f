"""Training adapters: the loop, several adapters on one base, and Ray Train jobs that run them side by side."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_ensemble.training.budget import task_steps
    from ray_ensemble.training.cache import AdapterJob, StartingPoint, TrainedAdapter, job_key
    from ray_ensemble.training.jobs import train_adapters
    from ray_ensemble.training.learner import TrainingState, learning_rate
    from ray_ensemble.training.loop import train_adapter
    from ray_ensemble.training.sampling import draw, sample_batch
    from ray_ensemble.training.together import AdapterRun, train_together

_HOMES = {
    "AdapterJob": "cache",
    "AdapterRun": "together",
    "StartingPoint": "cache",
    "TrainedAdapter": "cache",
    "TrainingState": "learner",
    "draw": "sampling",
    "job_key": "cache",
    "learning_rate": "learner",
    "sample_batch": "sampling",
    "task_steps": "budget",
    "train_adapter": "loop",
    "train_adapters": "jobs",
    "train_together": "together",
}

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


def __getattr__(name: str) -> Any:
    # Late: a controller of Ray Train needs one light module of this package and would pay seconds for PEFT.
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
