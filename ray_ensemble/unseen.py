"""`ray-ensemble weights RUN --task-folder DIR`: weights over a finished run's adapters for a dataset that was not in it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ray_ensemble.config import TaskConfig, load_config
from ray_ensemble.errors import InputError
from ray_ensemble.files import read_json, write_json
from ray_ensemble.run_folder import open_run
from ray_ensemble.runtime import prepare_environment
from ray_ensemble.storage import run_files, run_place
from ray_ensemble.tasks import Task, check_name, read_few, sample

EXAMPLES = 256  # labelled ones that weights are fitted on, if not said otherwise: every adapter makes a pass over them
PROMPTS = 256  # that a dataset without labels is compared by, at most


def unseen_weights(run: str | Path, task_folder: str | Path, examples: int = EXAMPLES) -> dict[str, Any]:
    """Weights of a dataset that the run has not seen: `unseen/<name>.json` in the run folder, and what it holds.

    With two labelled examples or more they are fitted on these and pulled towards uniform weights (a pass of every group's
    adapter over them); else the dataset is compared with the run's by the base's mean hidden states (docs/weights.md).

    Args:
        run: a run folder whose ensemble stage is whole.
        task_folder: `task.json`, and `train.jsonl` or `validation.jsonl`, whose lines may lack labels.
        examples: labelled examples to use at most; 0 leaves the labels out.

    Raises:
        InputError: the run is not that far, the folder is not a task, or its name is that of one of the run's datasets.
        RunError: a pass over the examples failed.
    """
    prepare_environment()
    from ray_ensemble.models import quiet_libraries
    from ray_ensemble.stages import Stages

    quiet_libraries()
    place, path = run_place(run), Path(task_folder)
    known = run_files(place, "ensemble")
    ensemble = read_json(known / "ensemble.json", "ensemble")
    if not path.is_dir():
        raise InputError(f"--task-folder {path}: no such folder")
    task = read_few(path, TaskConfig(source=str(path)))
    check_name(task.name, str(path))
    if task.name in ensemble["weights"]:
        raise InputError(f"{path}: '{task.name}' is a dataset of this run, whose weights are in its ensemble.json")
    with open_run(place, load_config(known / "config.yaml")) as folder, ExitStack() as stack:
        stages = Stages(folder, stack)
        labelled = sample(task["train"], examples)
        if len(labelled) > 1:
            chosen = replace(task, splits={**task.splits, "train": labelled})
            found = _from_examples(stages, chosen, len(task["train"]), ensemble)
        else:
            found = _from_similarity(stages, task, ensemble)
        result = {
            "name": task.name,
            "prompt": task.prompt,
            "labels": list(task.labels),
            "adapters": ensemble["adapters"],
            **found,
        }
        write_json(folder / "unseen" / f"{task.name}.json", result)
    return result


def _from_examples(stages: Any, task: Task, available: int, ensemble: dict[str, Any]) -> dict[str, Any]:
    from ray_ensemble.ensemble.unseen import weights_of_examples

    (encoded,) = stages.encode([task])
    labels = np.array([example.label for example in encoded["train"]])
    (scores,) = _scores(stages, [(encoded, encoded["train"])])
    # A run whose weights were not learned has scores as its adapters give them.
    fit = weights_of_examples(scores, labels, ensemble.get("shrinkage", {}).get("scale", 1.0))
    (losses,) = fit.losses
    assert losses is not None
    return {
        "weights": fit.weights[0].tolist(),
        "scale": fit.scales[0],
        "method": "examples",
        "examples": len(labels),
        "labelled": available,
        "shrinkage": fit.choice.described(),
        "held_out": {"learned": losses["learned"], "uniform": losses["uniform"]},
    }


def _from_similarity(stages: Any, task: Task, ensemble: dict[str, Any]) -> dict[str, Any]:
    from ray_ensemble.ensemble.unseen import weights_of_similarity
    from ray_ensemble.ensemble.weights import scale_of
    from ray_ensemble.evaluation.hidden_states import mean_hidden_states

    if stages.config.gradients.shards > 1:
        raise InputError(
            "weights without labels come from hidden states of the whole base on one device, and this run has gradients.shards; "
            "give labelled examples"
        )
    stages.refuse_changed_data()
    prompts = sample((*task["train"], *task["test"]), PROMPTS)
    (encoded,) = stages.encode([replace(task, splits={"train": prompts, "validation": (), "test": ()})])
    names = list(ensemble["weights"])
    known = [stages.task(name) for name in names]
    held_out = [stages.held_out(name) for name in names]
    scores = _scores(stages, list(zip(known, held_out, strict=True)))
    states = mean_hidden_states(
        [*known, encoded], stages.spec, stages.config.gradients, stages.base_hashes, stages.folder.path
    )
    fit = weights_of_similarity(
        states[-1],
        states[:-1],
        np.array([scale_of(ensemble, name) * np.array(ensemble["weights"][name]) for name in names]),
        # Its group's adapter, and the start, if there is one, behind the groups'.
        [[stages.own_group(name), *range(len(stages.group_names), len(stages.members))] for name in names],
        scores,
        [np.array([example.label for example in found]) for found in held_out],
    )
    shares = {
        name: {"share": float(share), "cosine": float(cosine)}
        for name, share, cosine in zip(names, fit.shares, fit.cosines, strict=True)
    }
    return {
        "weights": (fit.weights / fit.weights.sum()).tolist(),
        "scale": float(fit.weights.sum()),
        "method": "similarity",
        "examples": len(prompts),
        "temperature": fit.choice.described(),
        "datasets": shares,
    }


def _scores(stages: Any, wanted: list[Any]) -> list[Any]:
    """Scores (m, N, K) of the ensemble's adapters on the examples of each (task, examples)."""
    from ray_ensemble.ensemble import ScoreRequest, score_all

    stages.need_ray()
    names = stages.members
    requests = [
        ScoreRequest(stages.adapter_folder(name), task, examples) for task, examples in wanted for name in names
    ]
    config, hashes, path = stages.config.gradients, stages.base_hashes, stages.folder.path
    found = score_all(requests, stages.spec, config, hashes, path, "scores").scores
    return [np.stack(found[i : i + len(names)]) for i in range(0, len(found), len(names))]
