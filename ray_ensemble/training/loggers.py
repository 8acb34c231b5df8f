"""Where the steps of a training are shown besides `train.jsonl`: TensorBoard files, MLflow, Weights & Biases. No Ray here.

Each logger takes the rows of the log as they are made, under the step that they were made at, so that a resumed training writes
the steps after its checkpoint again. MLflow and Weights & Biases find their servers and keys in the workers' environment
(`MLFLOW_TRACKING_URI`, `WANDB_API_KEY`, `WANDB_MODE` …); nothing of them is in the job file or the run folder's config.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ray_ensemble.config import Logger
from ray_ensemble.errors import InputError

Log = Callable[[dict[str, Any]], Any]

PROJECT = "ray_ensemble"  # of MLflow's experiment and of Weights & Biases
_MODULES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}


def check_loggers(names: Sequence[Logger]) -> None:
    """Refuse loggers whose library is not installed here.

    Raises:
        InputError: it names the library.
    """
    for name in names:
        if importlib.util.find_spec(_MODULES[name]) is None:
            raise InputError(
                f"training.loggers: {name} needs the package '{_MODULES[name]}' on every node: pip install {_MODULES[name]}"
            )


@contextmanager
def open_loggers(names: Sequence[Logger], folder: Path, run: str, key: str, step: int) -> Iterator[Log]:
    """A function that shows a row in all of `names`, for one adapter's training.

    Args:
        names: which.
        folder: the run folder; TensorBoard's files go to `tensorboard/<run>` in it.
        run: the adapter's name.
        key: what the adapter is cached by: the same training, resumed, goes on in the same run.
        step: the first step that will be logged.
    """
    makers: dict[Logger, Callable[[Path, str, str, int], AbstractContextManager[Log]]] = {
        "tensorboard": _tensorboard,
        "mlflow": _mlflow,
        "wandb": _wandb,
    }
    with ExitStack() as stack:
        logs = [stack.enter_context(makers[name](folder, run, key, step)) for name in names]

        def log(row: dict[str, Any]) -> None:
            for each in logs:
                each(row)

        yield log


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in row.items() if key != "step"}


@contextmanager
def _tensorboard(folder: Path, run: str, key: str, step: int) -> Iterator[Log]:
    from tensorboardX import SummaryWriter

    target = folder / "tensorboard" / f"{_safe(run)}-{key[:8]}"
    # Readers drop what an interrupted training wrote from this step on.
    with SummaryWriter(str(target), purge_step=step, filename_suffix=f".from-{step:06d}") as writer:

        def log(row: dict[str, Any]) -> None:
            for name, value in _numbers(row).items():
                writer.add_scalar(name, value, row["step"])

        yield log


@contextmanager
def _mlflow(folder: Path, run: str, key: str, step: int) -> Iterator[Log]:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name(PROJECT)
    identity = experiment.experiment_id if experiment else client.create_experiment(PROJECT)
    before = client.search_runs([identity], f"tags.adapter = '{key}'", max_results=1)
    found = before[0] if before else client.create_run(identity, run_name=run, tags={"adapter": key})
    ended = "FAILED"
    try:
        yield lambda row: [
            client.log_metric(found.info.run_id, name, value, step=row["step"]) for name, value in _numbers(row).items()
        ]
        ended = "FINISHED"
    finally:
        client.set_terminated(found.info.run_id, ended)


@contextmanager
def _wandb(folder: Path, run: str, key: str, step: int) -> Iterator[Log]:
    import wandb

    target = folder / "wandb"
    target.mkdir(parents=True, exist_ok=True)
    with wandb.init(
        project=PROJECT, name=run, id=key, resume="allow", dir=str(target), group=folder.name, reinit="create_new"
    ) as session:
        yield lambda row: session.log(_numbers(row), step=row["step"])


def _safe(name: str) -> str:
    """A folder name: names of adapters may hold those of tasks and signs."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name).lstrip(".")[:80]
