"""Routing, in the ensemble and evaluation stages: where an input's dataset is not known, its text picks the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ray_ensemble.ensemble.router import Router, fit_router, mix, shares
from ray_ensemble.ensemble.weights import label_losses
from ray_ensemble.estimator import validation_halves
from ray_ensemble.evaluation import forward_flops
from ray_ensemble.evaluation.hidden_states import pooled_hidden_states
from ray_ensemble.files import read_json
from ray_ensemble.tasks import EncodedExample, sample

if TYPE_CHECKING:
    from ray_ensemble.stages import Stages

EXAMPLES = 256  # training texts of each dataset that the router learns from, at most


def train_router(
    stages: Stages, weights: Mapping[str, NDArray[np.float64]], scores: Mapping[str, NDArray[np.float32]]
) -> tuple[list[Path], float]:
    """Fit the router on training texts and write it to `router/`; its files and its operations.

    Args:
        stages: of a run whose groups are trained.
        weights: of each dataset (m,) over the groups' adapters, times its scale.
        scores: (m, V, K) of the half of each dataset's validation examples that weights are fitted on.
    """
    texts: dict[str, dict[str, tuple[EncodedExample, ...]]] = {"train": {}, "held out": {}}
    for task in stages.texts:
        texts["train"][task.name] = sample(task["train"], EXAMPLES)
        half = validation_halves(len(task["validation"]))[1]
        texts["held out"][task.name] = tuple(task["validation"][i] for i in half)
    train, held_out = (_states(stages, texts[part]) for part in texts)
    router = fit_router(train, held_out)
    # Under a mixture or under the likeliest dataset's weights: what held-out examples fare better with.
    table = np.array([weights[task] for task in router.tasks])  # (n, m)
    losses = {
        mixture: np.mean([_loss(stages, router, task, held_out[task], scores[task], table, mixture) for task in scores])
        for mixture in (False, True)
    }
    router = replace(router, mixture=bool(losses[True] < losses[False]))
    folder = stages.folder / "router"
    router.save(folder)
    tokens = sum(len(e.prompt_ids) for part in texts.values() for examples in part.values() for e in examples)
    return sorted(folder.iterdir()), forward_flops(stages.size(), tokens)


@dataclass(frozen=True, eq=False)
class Routed:
    """Test inputs with what the router made of them.

    - `picked`: task -> (N,) place of the likeliest dataset;
    - `parts`: task -> (N, C) coefficients of `columns`, the adapters;
    - `needed`: (task, adapter) -> places of the examples whose score it has a part of.
    """

    stages: Stages
    router: Router
    columns: tuple[str, ...]
    picked: Mapping[str, NDArray[np.int64]]
    parts: Mapping[str, NDArray[np.float64]]

    @property
    def needed(self) -> dict[tuple[str, str], NDArray[np.int64]]:
        """See the class."""
        found = {
            (task, name): np.flatnonzero(parts[:, column])
            for task, parts in self.parts.items()
            for column, name in enumerate(self.columns)
        }
        return {key: places for key, places in found.items() if len(places)}

    def scores(self, task: str, scored: Mapping[tuple[str, str], NDArray[Any]]) -> NDArray[np.float64]:
        """Scores (N, K) of a task's test inputs under routed weights, with the task's own prompts and label words.

        Args:
            task: a dataset.
            scored: (task, adapter) -> scores of all test inputs (N, K), or of those in `needed` alone.
        """
        parts, classes = self.parts[task], len(self.stages.task(task).labels)
        stack = np.zeros((len(self.columns), len(parts), classes), dtype=np.float32)
        for (of, name), places in self.needed.items():
            if of == task:
                found = scored[task, name]
                stack[self.columns.index(name), places] = found if len(found) == len(places) else found[places]
        return mix(stack, parts)

    def figures(
        self, outputs: Mapping[str, Mapping[str, NDArray[Any]]], labels: Mapping[str, NDArray[np.integer[Any]]]
    ) -> dict[str, Any]:
        """`accuracy`: how often the router picks the right dataset. `end_to_end`: accuracy where prompt and label words are
        those of the picked dataset as well; inputs that are sent to a dataset which asks something else count as wrong.
        """
        described = read_json(self.stages.folder / "tasks.json", "list of tasks")["tasks"]
        asked = {task["name"]: (task["prompt"], task["labels"]) for task in described}
        tasks: dict[str, dict[str, float]] = {}
        for task, picked in self.picked.items():
            same = np.array([asked[name] == asked[task] for name in self.router.tasks])[picked]
            right = outputs[task]["routed"].argmax(axis=1) == labels[task]
            chosen = np.array(self.router.tasks)[picked] == task
            tasks[task] = {"accuracy": float(chosen.mean()), "end_to_end": float((same & right).mean())}
        mean = {key: float(np.mean([found[key] for found in tasks.values()])) for key in ("accuracy", "end_to_end")}
        return {"tasks": tasks, "mean": mean, "mixture": self.router.mixture}


def route(stages: Stages, parts: Mapping[str, Mapping[str, float]]) -> Routed:
    """Send every test input where its text says.

    Args:
        stages: of a run whose ensemble stage is whole.
        parts: of each dataset the coefficients of adapters in its score.
    """
    router = Router.load(stages.folder / "router")
    columns = tuple(dict.fromkeys(name for task in router.tasks for name in parts[task]))
    table = np.array([[parts[task].get(name, 0.0) for name in columns] for task in router.tasks])  # (n, C)
    states = _states(stages, {task.name: task["test"] for task in stages.texts})
    return Routed(
        stages,
        router,
        columns,
        {task: router.probabilities(found).argmax(axis=1) for task, found in states.items()},
        {task: router.shares(found) @ table for task, found in states.items()},
    )


def _states(stages: Stages, texts: Mapping[str, tuple[EncodedExample, ...]]) -> dict[str, NDArray[np.float32]]:
    config, folder = stages.config.gradients, stages.folder.path
    return pooled_hidden_states(texts, stages.spec, config, stages.base_hashes, folder)


def _loss(
    stages: Stages,
    router: Router,
    task: str,
    states: NDArray[np.float32],
    scores: NDArray[np.float32],
    table: NDArray[np.float64],
    mixture: bool,
) -> float:
    labels = np.array([example.label for example in stages.held_out(task)])
    routed = mix(scores, shares(router.probabilities(states), mixture) @ table)
    return float(label_losses(routed, labels).mean())
