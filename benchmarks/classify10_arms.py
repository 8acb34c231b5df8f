"""The arms of `classify10.py`: what each trains, with how many steps, how it predicts, and what it costs."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from classify10_experiment import Experiment, Result, Scores, Work
from numpy.typing import NDArray

from ray_ensemble.adapter_stages import ensemble
from ray_ensemble.ensemble import add_up, coefficients, combine, learn_weights, scale_of
from ray_ensemble.evaluation import ModelSize, forward_flops, losses_and_hits
from ray_ensemble.files import read_json, write_json
from ray_ensemble.stages import Stages
from ray_ensemble.training import AdapterJob, TrainedAdapter, task_steps

RATES = {"qlora_lower_rate": 1 / 3, "qlora_higher_rate": 3.0}  # times the job's learning rate
BOOSTING_STEPS = 2  # where the job has none


@dataclass(frozen=True)
class Arm:
    """One line of the table.

    `works` are the adapters that it trains, `uses` those of arms before it: they are there, unless these arms' results came
    from another folder. `needs` names what must be there for a seed: `search`, `hidden_states`, or another arm's result.
    """

    told: str
    result: Callable[[Experiment, int], Result]
    works: Callable[[Experiment, int], list[Work]] | None = None
    needs: tuple[str, ...] = ()
    uses: Callable[[Experiment, int], list[Work]] | None = None

    @property
    def adapters(self) -> Callable[[Experiment, int], list[Work]] | None:
        """All that it needs trained."""
        return self.works or self.uses


# One adapter on everything ----------------------------------------------------------------------------------------------


def _joint(name: str, rate: float = 1.0) -> Callable[[Experiment, int], list[Work]]:
    def works(experiment: Experiment, seed: int) -> list[Work]:
        return [experiment.work(name, experiment.names, experiment.steps, seed, rate, fresh=True)]

    return works


def _single(works: Callable[[Experiment, int], list[Work]]) -> Callable[[Experiment, int], Result]:
    """The result of an arm of one adapter."""

    def result(experiment: Experiment, seed: int) -> Result:
        (work,) = works(experiment, seed)
        (adapter,) = experiment.adapters([work])
        found = Result(experiment.score_one(adapter.folder, work.place))
        found.charge("training", [adapter], work.place.size())
        found.about = {"rate": work.config.training.learning_rate, "rank": work.place.config.adapter.rank}
        return found

    return result


def _base(experiment: Experiment, seed: int) -> Result:
    return Result(experiment.score_one(None, experiment.job))


def _scaled(experiment: Experiment, seed: int) -> Result:
    """One QLoRA with a scale for each task, fitted as ours are and on the same held-out examples."""
    (adapter,) = experiment.adapters(_joint("qlora_all")(experiment, seed))
    started = time.monotonic()
    folders: dict[tuple[str, str], Path | None] = {(task, ""): adapter.folder for task in experiment.names}
    scores, tokens = experiment.score(folders, experiment.job, "held out")
    labels = [np.array([e.label for e in experiment.job.held_out(task)]) for task in experiment.names]
    fit = learn_weights([found[None] for found in scores.values()], labels, [np.ones(1)] * len(labels))
    seconds = time.monotonic() - started
    test = dict(zip(experiment.names, experiment.scores("qlora_all", seed), strict=True))
    result = Result({task: combine(test[task][None], w) for task, w in zip(test, fit.scaled, strict=True)})
    result.like(experiment.cost("qlora_all", seed))
    result.add("validation", forward_flops(experiment.job.size(), tokens), seconds)
    result.about = {**result.about, "scales": dict(zip(test, fit.scales, strict=True))}
    return result


def _tuned_works(experiment: Experiment, seed: int) -> list[Work]:
    return [work for name in ("qlora_all", *RATES) for work in _joint(name, RATES.get(name, 1.0))(experiment, seed)]


def _tuned(experiment: Experiment, seed: int) -> Result:
    """The learning rate of least mean validation loss, or of highest accuracy where the search goes by that."""
    works = dict(zip(("qlora_all", *RATES), _tuned_works(experiment, seed), strict=True))
    adapters = dict(zip(works, experiment.adapters(list(works.values())), strict=True))
    folders: dict[tuple[str, str], Path | None] = {
        (task, name): adapter.folder for name, adapter in adapters.items() for task in experiment.names
    }
    started = time.monotonic()
    scores, tokens = experiment.score(folders, experiment.job, "validation")
    seconds = time.monotonic() - started
    labels = {task.name: np.array([e.label for e in task["validation"]]) for task in experiment.job.encoded}
    objective = experiment.config.search.objective
    reached = {name: validation_means([scores[task, name] for task in labels], list(labels.values())) for name in works}
    chosen = choose_rate(reached, objective)
    result = Result(experiment.score_one(adapters[chosen].folder, experiment.job))
    result.charge("training", list(adapters.values()), experiment.job.size())
    result.adapters = 1
    result.add("validation", forward_flops(experiment.job.size(), tokens), seconds)
    result.about = {
        "rate": works[chosen].config.training.learning_rate,
        "validation": {
            f"{works[name].config.training.learning_rate:g}": {"loss": loss, "accuracy": accuracy}
            for name, (loss, accuracy) in reached.items()
        },
    }
    return result


def validation_means(scores: Sequence[Scores], labels: Sequence[NDArray[Any]]) -> tuple[float, float]:
    """Mean over tasks of loss and accuracy."""
    values = [losses_and_hits(each, right) for each, right in zip(scores, labels, strict=True)]
    return float(np.mean([a.mean() for a, _ in values])), float(np.mean([b.mean() for _, b in values]))


def choose_rate(reached: Mapping[str, tuple[float, float]], objective: str) -> str:
    """The name of least loss or, for `accuracy`, of highest accuracy and then least loss."""
    return min(
        reached, key=lambda name: reached[name] if objective == "loss" else (-reached[name][1], reached[name][0])
    )


def _wide_works(experiment: Experiment, seed: int) -> list[Work]:
    place = experiment.wide(len(experiment.found(seed)["groups"]))
    job = AdapterJob(
        f"qlora_wide, seed {seed}", tuple(experiment.names), experiment.steps, experiment.config.training.seed + seed
    )
    return [Work(job, place, place.config)]


def _longer_works(experiment: Experiment, seed: int) -> list[Work]:
    joint, ours = experiment.cost("qlora_all", seed), experiment.cost("boosted", seed)
    steps = equal_flops_steps(joint["steps"], sum(joint["flops"].values()), sum(ours["flops"].values()))
    return [experiment.work("qlora_longer", experiment.names, steps, seed, fresh=True)]


def equal_flops_steps(steps: int, flops: float, target: float) -> int:
    """Steps that cost at least `target`, when `steps` cost `flops`; never fewer than these."""
    return max(steps, math.ceil(target / (flops / steps)))


# One adapter a group ----------------------------------------------------------------------------------------------------


def _group_works(kind: str) -> Callable[[Experiment, int], list[Work]]:
    def works(experiment: Experiment, seed: int) -> list[Work]:
        groups = experiment.groups(kind, seed)
        shares = experiment.shares
        return [experiment.work("+".join(g), g, sum(shares[task] for task in g), seed) for g in groups]

    return works


def _fresh_works(experiment: Experiment, seed: int) -> list[Work]:
    """One adapter a task from θ₀ as drawn: the common start's steps are shared out too."""
    steps = task_steps(experiment.examples, experiment.config.training, experiment.warm_up)
    return [
        experiment.work(name, [name], count, seed, fresh=True)
        for name, count in zip(experiment.names, steps, strict=True)
    ]


def _alone(works: Callable[[Experiment, int], list[Work]], fresh: bool) -> Callable[[Experiment, int], Result]:
    """Every task by its own adapter."""

    def result(experiment: Experiment, seed: int) -> Result:
        adapters = experiment.adapters(works(experiment, seed))
        folders: dict[tuple[str, str], Path | None] = {
            (task, ""): adapter.folder for task, adapter in zip(experiment.names, adapters, strict=True)
        }
        scores, _ = experiment.score(folders, experiment.job)
        found = Result({task: each for (task, _), each in scores.items()})
        found.charge("training", adapters, experiment.job.size())
        if not fresh:
            experiment.charge_start(found)
        return found

    return result


def _uniform(experiment: Experiment, seed: int) -> Result:
    """Every task by the mean of all tasks' adapters' log-probabilities."""
    adapters = experiment.adapters(_group_works("alone")(experiment, seed))
    own = list(zip(experiment.names, adapters, strict=True))
    folders: dict[tuple[str, str], Path | None] = {
        (task, name): adapter.folder for task in experiment.names for name, adapter in own
    }
    scores, _ = experiment.score(folders, experiment.job)
    weights = np.full(len(own), 1.0 / len(own))
    result = Result({})
    for task in experiment.names:
        result.scores[task] = combine(np.stack([scores[task, name] for name, _ in own]), weights)
    result.like(experiment.cost("per_dataset", seed))
    return result


def _ensemble(kind: str) -> Callable[[Experiment, int], Result]:
    """A partition's adapters under weights that the ensemble stage fits."""

    def result(experiment: Experiment, seed: int) -> Result:
        works = _group_works(kind)(experiment, seed)
        adapters = experiment.adapters(works)
        place = experiment.place(kind, seed)
        groups = experiment.groups(kind, seed)
        if kind != "found":
            write_json(place.folder / "partition.json", {"groups": groups, "m": len(groups), "method": kind})
        _install(place, adapters)
        seconds, facts = _timed_ensemble(place)
        found = Result(_ensemble_scores(experiment, place))
        found.charge("groups", adapters, experiment.job.size())
        found.adapters += place.warm  # the common start is weighed with them
        merging = {"flops": facts["merging_flops"], "seconds": facts["merging_seconds"]}  # charged to `merged` alone
        found.add("ensemble", facts["flops"], seconds - merging["seconds"], facts["peak_memory_bytes"])
        found.about = {"groups": groups, "m": len(groups), "group_steps": [work.job.steps for work in works]}
        found.about["merging"] = merging
        if kind == "found":
            found.steps += experiment.warm_up
            for part, stages in (("gradients", experiment.job), ("search", place)):
                cost = stages.folder.facts(part)
                found.add(part, float(cost["flops"]), cost["seconds"], cost["peak_memory_bytes"])
        else:
            experiment.charge_start(found)
        if kind == "hidden_states":
            states = read_json(experiment.states_file, "cost of the hidden states")
            flops = forward_flops(ModelSize(experiment.job.size().backbone, 0), states["tokens"])
            found.add("hidden_states", flops, states["seconds"])
        return found

    return result


def _install(place: Stages, adapters: Sequence[TrainedAdapter]) -> None:
    """Put trained adapters where the stages look for them."""
    for name, adapter in zip(place.group_names, adapters, strict=True):
        target = place.adapter_folder(name)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(adapter.folder, target)


def _timed_ensemble(place: Stages) -> tuple[float, dict[str, Any]]:
    started = time.monotonic()
    _, facts = ensemble(place)
    return time.monotonic() - started, facts


def _ensemble_scores(experiment: Experiment, place: Stages) -> dict[str, Scores]:
    """Test scores of what `ensemble.json` says, boosters included."""
    told = read_json(place.folder / "ensemble.json", "ensemble")
    parts = {task: coefficients(told, task) for task in experiment.names}
    folders = {(task, name): place.scored_adapter(name) for task in parts for name in parts[task]}
    scores, _ = experiment.score(folders, place)
    return {task: add_up({name: scores[task, name] for name in each}, each) for task, each in parts.items()}


def _boosted(experiment: Experiment, seed: int) -> Result:
    """The found groups with boosters; weights and validation passes are those without."""
    steps = experiment.config.boosting.steps or BOOSTING_STEPS
    place = experiment.place("boosted", seed, steps)
    shutil.copy(experiment.place("found", seed).folder / "partition.json", place.folder.path)
    _install(place, experiment.adapters(_group_works("found")(experiment, seed)))
    seconds, facts = _timed_ensemble(place)
    result = Result(_ensemble_scores(experiment, place))
    result.like(experiment.cost("ours", seed))
    seconds -= facts["merging_seconds"]
    result.add("boosting", facts["boosting_flops"], seconds, facts["peak_memory_bytes"])
    told = read_json(place.folder / "ensemble.json", "ensemble")["boosting"]
    result.adapters += len(told["adapters"])
    trained = sum(row.get("steps", 0) for row in told["history"])  # with boosting.method: train
    result.steps += trained
    result.about = {**result.about, "boosters": told["adapters"], "stopped": told["stopped"]}
    return result


def _merged(experiment: Experiment, seed: int) -> Result:
    """The found groups' ensemble without boosters, as one adapter a task."""
    place = experiment.place("found", seed)
    if not (place.folder / "ensemble.json").exists():  # the record of `ours` is from another folder
        _install(place, experiment.adapters(_group_works("found")(experiment, seed)))
        ensemble(place)
    folders: dict[tuple[str, str], Path | None] = {
        (task, ""): place.folder / "merged" / task for task in experiment.names
    }
    scores, _ = experiment.score(folders, place)
    told = read_json(place.folder / "ensemble.json", "ensemble")
    result = Result({task: scale_of(told, task) * each for (task, _), each in scores.items()})
    result.like(experiment.cost("ours", seed))
    result.add("merging", **result.about["merging"])
    return result


def _own_group(experiment: Experiment, seed: int) -> Result:
    """Every task by its own found group's adapter: no weights, and no validation passes for them."""
    adapters = experiment.adapters(_group_works("found")(experiment, seed))
    own = {
        task: each.folder
        for group, each in zip(experiment.groups("found", seed), adapters, strict=True)
        for task in group
    }
    folders: dict[tuple[str, str], Path | None] = {(task, ""): own[task] for task in experiment.names}
    scores, _ = experiment.score(folders, experiment.job)
    result = Result({task: each for (task, _), each in scores.items()})
    result.like(experiment.cost("ours", seed), without=["ensemble"])
    result.adapters = len(adapters)  # a start that ours weighs is not used
    return result


def _joint_arm(told: str, name: str, rate: float = 1.0) -> Arm:
    works = _joint(name, rate)
    return Arm(told, _single(works), works)


def _partition_arm(told: str, kind: str, needs: tuple[str, ...] = ("search",)) -> Arm:
    return Arm(told, _ensemble(kind), _group_works(kind), needs)


def _found_arm(told: str, result: Callable[[Experiment, int], Result]) -> Arm:
    """An arm made of the adapters of `ours`."""
    return Arm(told, result, needs=("search", "ours"), uses=_group_works("found"))


# In the order in which they are done.
ARMS: dict[str, Arm] = {
    "base": Arm("base model, not trained", _base),
    "qlora_all": _joint_arm("one QLoRA on all", "qlora_all"),
    "qlora_scaled": Arm(
        "one QLoRA, scores scaled on validation", _scaled, needs=("qlora_all",), uses=_joint("qlora_all")
    ),
    "ours": _partition_arm("ours: found groups, fitted weights", "found"),
    "own_group": _found_arm("ours without weights: own group's adapter", _own_group),
    "merged": _found_arm("ours merged into one adapter a dataset", _merged),
    "boosted": _found_arm("ours with boosting", _boosted),
    "per_dataset": Arm("one adapter per dataset", _alone(_group_works("alone"), fresh=False), _group_works("alone")),
    "uniform": Arm("uniform ensemble of these n", _uniform, needs=("per_dataset",), uses=_group_works("alone")),
    "random": _partition_arm("random groups, as many, fitted weights", "random"),
    "hidden_states": _partition_arm(
        "groups by hidden states, as many, fitted weights", "hidden_states", ("search", "hidden_states")
    ),
    "by_hand": _partition_arm("groups by hand (--groups), fitted weights", "by_hand", needs=()),
    "qlora_lower_rate": _joint_arm("one QLoRA, learning rate / 3", "qlora_lower_rate", RATES["qlora_lower_rate"]),
    "qlora_higher_rate": _joint_arm("one QLoRA, learning rate · 3", "qlora_higher_rate", RATES["qlora_higher_rate"]),
    "qlora_tuned": Arm(
        "one QLoRA, best of the three rates on validation", _tuned, needs=("qlora_all", *RATES), uses=_tuned_works
    ),
    "qlora_wide": Arm("one QLoRA of rank m·r", _single(_wide_works), _wide_works, needs=("search",)),
    "qlora_longer": Arm(
        "one QLoRA with our total FLOPs in steps", _single(_longer_works), _longer_works, ("qlora_all", "boosted")
    ),
    "per_dataset_fresh": Arm(
        "one adapter per dataset, no common start", _alone(_fresh_works, fresh=True), _fresh_works
    ),
}
