"""A whole file of rows through a run's ensembles, by actors of Ray Data."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from ray_ensemble.config import load_config
from ray_ensemble.ensemble.prediction import Predictor, Request
from ray_ensemble.errors import InputError, RunError, nearest
from ray_ensemble.files import whole_file
from ray_ensemble.pool import bundle_of, pool_size
from ray_ensemble.progress import Bar
from ray_ensemble.runtime import ray_session
from ray_ensemble.serving.requests import answers, check_rows, tasks_of
from ray_ensemble.storage import run_files, run_place
from ray_ensemble.tasks import read_jsonl

_ROWS = 256  # that an actor takes at a time
_RESTARTS = 2  # of an actor that dies; without a bound Ray Data would start it again for ever

Columns = dict[str, NDArray[Any]]


def predict_file(
    folder: str | Path,
    source: str | Path,
    target: str | Path | None,
    *,
    task: str | None = None,
    merged: bool = False,
    generate: int | None = None,
) -> int:
    """Answer every row of a JSONL file, a line for each in the same order. Returns how many there were.

    Rows hold the fields of their prompt, and the dataset under `task` unless one is given for all. All rows are checked
    before Ray starts.

    Args:
        folder: a run that has come to its ensemble.
        source: the file; blank lines are left out.
        target: the file to write, whole or not at all; None is standard output.
        task: the dataset of every row.
        merged: by merged adapters, as for `Predictor`.
        generate: write up to so many tokens in place of choosing a label word, as `Predictor.generate` does.

    Raises:
        InputError: a row that is wrong, told by its line; or no such run, dataset or file.
        RunError: the actors failed.
    """
    place = run_place(folder)
    run = place if isinstance(place, str) else str(place.resolve())
    tasks = tasks_of(run)
    if task is not None and task not in tasks:
        raise InputError(f"--task: no task '{task}'{nearest(task, tasks)} (tasks: {', '.join(tasks)})")
    rows = check_rows(read_jsonl(Path(source)), str(source), tasks, task)
    if not rows:
        raise InputError(f"--input {source}: has no rows")
    with _output(target) as stream, ray_session(), Bar("predict", len(rows), "rows") as bar:
        found = _answers(run, [request for _, request in rows], merged, generate)
        for (line, _), answer in zip(rows, found, strict=True):
            if "error" in answer:
                raise InputError(f"{source}:{line}: {answer['error']}")
            stream.write(json.dumps(answer, ensure_ascii=False) + "\n")
            bar.advance()
    return len(rows)


class Answerer:
    """One copy of the base with the adapters that the rows need; the class behind Ray Data's actors."""

    def __init__(self, folder: str, tasks: Sequence[str], merged: bool, generate: int | None, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        predictor = Predictor(folder, tasks, merged)
        self._ask = predictor.predict if generate is None else partial(predictor.generate, max_new_tokens=generate)

    def __call__(self, rows: Columns) -> Columns:
        """Columns `number` and `request` (JSON) -> `number` and `answer` (JSON, with `error` alone where there is none)."""
        found = [
            {"error": str(answer)} if isinstance(answer, InputError) else answer
            for answer in answers(self._ask, [tuple(json.loads(text)) for text in rows["request"]])
        ]
        return {"number": rows["number"], "answer": np.array([json.dumps(answer) for answer in found], dtype=object)}


def _answers(run: str, requests: Sequence[Request], merged: bool, generate: int | None) -> Iterator[dict[str, Any]]:
    import ray

    config = load_config(run_files(run) / "config.yaml").gradients
    blocks = -(-len(requests) // _ROWS)
    size = pool_size(config.replicas, config.threads, blocks)
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    with ray.data.DataContext.current(context):
        rows = [{"number": number, "request": json.dumps(request)} for number, request in enumerate(requests)]
        answered = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
            Answerer,
            fn_constructor_args=(run, sorted({task for task, _ in requests}), merged, generate, config.threads),
            batch_size=_ROWS,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(min_size=size.least, max_size=size.most),
            num_cpus=config.threads,
            num_gpus=bundle_of(config, size).get("GPU", 0.0),
            ray_remote_args_fn=lambda: {"max_restarts": _RESTARTS, "max_task_retries": _RESTARTS},
        )
        try:
            for expected, row in enumerate(answered.iter_rows()):
                if row["number"] != expected:
                    raise RunError(f"row {expected} came back as row {row['number']}")
                yield json.loads(row["answer"])
        except ray.exceptions.RayError as error:
            prefix = f"{InputError.__module__}.{InputError.__name__}: "
            reasons = [line.partition(prefix)[2] for line in str(error).splitlines() if prefix in line]
            if reasons:
                raise InputError(reasons[-1]) from None
            raise RunError(f"predict: an actor failed: {str(error).strip().splitlines()[-1]}") from error


@contextmanager
def _output(target: str | Path | None) -> Iterator[TextIO]:
    if target is None:
        yield sys.stdout
        return
    try:
        with whole_file(Path(target)) as temporary, temporary.open("w", encoding="utf-8") as stream:
            yield stream
            stream.flush()
    except OSError as error:
        raise InputError(f"--output {target}: cannot be written ({error.strerror})") from None
