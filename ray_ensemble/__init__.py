"""Fine-tune one language model on many datasets: gradients, estimate, groups, adapters, ensemble."""

from typing import TYPE_CHECKING, Any

from ray_ensemble.errors import InputError, RunError
from ray_ensemble.version import __version__

if TYPE_CHECKING:
    from ray_ensemble.pipeline import Job, RunResult
    from ray_ensemble.submission import submit

__all__ = ["InputError", "Job", "RunError", "RunResult", "__version__", "submit"]


def __getattr__(name: str) -> Any:
    # Late, so that Ray workers and the command line's --help do not pay for what they do not use.
    if name in ("Job", "RunResult"):
        from ray_ensemble import pipeline

        return getattr(pipeline, name)
    if name == "submit":
        from ray_ensemble.submission import submit

        return submit
    raise AttributeError(f"module 'ray_ensemble' has no attribute '{name}'")
