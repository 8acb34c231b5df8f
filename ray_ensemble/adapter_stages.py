"""The stages that make the result out of the groups: their adapters, the ensemble's weights, the figures on test data."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ray_ensemble.files import read_json, write_json
from ray_ensemble.run_folder import STAGES
from ray_ensemble.storage import located

if TYPE_CHECKING:
    from ray_ensemble.stages import Outcome, Stages


def train(stages: Stages) -> Outcome:
    """One adapter a group, and the baseline on everything with the same total of steps, all side by side.

    With `gradients.start: meta` the baseline starts fresh and gets the warm-up's steps too, in one schedule.
    """
    from ray_ensemble.evaluation import training_flops
    from ray_ensemble.training import AdapterJob, StartingPoint, train_adapters

    stages.need_ray()
    examples = {task.name: len(task["train"]) for task in stages.encoded}
    settings = stages.config.training
    jobs = [
        AdapterJob(name, tuple(group), settings.steps(sum(examples[t] for t in group)), settings.seed)
        for name, group in zip(stages.group_names, stages.partition, strict=True)
    ]
    steps, fresh = sum(job.steps for job in jobs), None
    if stages.warm:
        steps += stages.config.gradients.meta_steps
        fresh = StartingPoint(located(stages.folder.path, stages.init), stages.planned["adapter"]["hash"])
    baseline = AdapterJob("qlora_all", tuple(examples), steps, settings.seed, fresh)
    trained = train_adapters(
        [*jobs, baseline], stages.encoded, stages.config, stages.folder.path, asdict(stages.spec), stages.base_hashes
    )
    files = []
    for name, adapter in trained.items():
        target = stages.adapter_folder(name)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(adapter.folder, target)
        files += sorted(target.iterdir())
    size = stages.size()
    return files, {
        "flops": {
            name: training_flops(size, adapter.tokens, adapter.validation_tokens) for name, adapter in trained.items()
        },
        "job_seconds": {name: round(adapter.seconds, 3) for name, adapter in trained.items()},
        "steps": {name: adapter.steps for name, adapter in trained.items()},
        "peak_memory_bytes": max(adapter.peak_memory_bytes for adapter in trained.values()),
    }


def ensemble(stages: Stages) -> Outcome:
    """Weights of each dataset over the groups' adapters and a trained common start, on the half of its validation data that the
    search did not see; then boosting, which adds to them, the router, and all of it as one merged adapter a dataset.
    """
    from ray_ensemble.ensemble import ScoreRequest, combine, score_all
    from ray_ensemble.evaluation import forward_flops
    from ray_ensemble.merging import merge_ensembles

    names, settings = stages.members, stages.config.ensemble
    learned = settings.weights == "learned"  # also where there is one adapter: its scores still have a scale
    boosting = stages.config.boosting.steps > 0
    own = {task.name: np.eye(len(names))[stages.own_group(task.name)] for task in stages.encoded}
    alike = [1.0 / len(names)] * len(names)
    weights = {task: alike if settings.weights == "uniform" else found.tolist() for task, found in own.items()}
    scales = dict.fromkeys(own, 1.0)
    described: dict[str, Any] = {"adapters": names, "method": settings.weights}
    scores: dict[str, NDArray[np.float32]] = {}
    tokens, peak = 0, 0
    if learned or boosting or settings.router:
        stages.need_ray()
        held_out = {task.name: stages.held_out(task.name) for task in stages.encoded}
        requests = [
            ScoreRequest(stages.adapter_folder(name), task, held_out[task.name])
            for task in stages.encoded
            for name in names
        ]
        scored = score_all(
            requests, stages.spec, stages.config.gradients, stages.base_hashes, stages.folder.path, "validation scores"
        )
        tokens, peak = scored.tokens, scored.peak_memory_bytes
        scores = {
            task.name: np.stack(scored.scores[i * len(names) : (i + 1) * len(names)])
            for i, task in enumerate(stages.encoded)
        }
    if learned:
        weights, scales, about = _learned_weights(stages, scores, own)
        described |= about
    scaled = {task: scales[task] * np.array(found) for task, found in weights.items()}
    files = [stages.folder / "ensemble.json"]
    facts = {"flops": forward_flops(stages.size(), tokens), "peak_memory_bytes": peak}
    shutil.rmtree(stages.folder / "boosters", ignore_errors=True)
    boosted: dict[str, Any] = {"steps": stages.config.boosting.steps, "adapters": []}
    if boosting:
        from ray_ensemble.boosting import boost

        done = boost(stages, scaled, {task: combine(found, scaled[task]) for task, found in scores.items()})
        boosted |= done.described()
        files += done.files
        facts["boosting_flops"] = done.flops
        facts["peak_memory_bytes"] = max(peak, done.peak_memory_bytes)
    shutil.rmtree(stages.folder / "router", ignore_errors=True)
    if settings.router:
        from ray_ensemble.routing import train_router

        router_files, router_flops = train_router(stages, scaled, scores)
        files += router_files
        facts["flops"] += router_flops
    described |= {"weights": weights, "scales": scales, "boosting": boosted}
    started = time.monotonic()
    merged = merge_ensembles(stages, described, scored=bool(scores))
    files += merged.files
    facts |= {"merging_flops": merged.flops, "merging_seconds": round(time.monotonic() - started, 3)}
    facts["peak_memory_bytes"] = max(facts["peak_memory_bytes"], merged.peak_memory_bytes)
    write_json(stages.folder / "ensemble.json", {**described, "merged": merged.told})
    return files, facts


def _learned_weights(
    stages: Stages, scores: Mapping[str, NDArray[np.float32]], own: Mapping[str, NDArray[np.float64]]
) -> tuple[dict[str, list[float]], dict[str, float], dict[str, Any]]:
    """Weights and scale of each dataset, and what `ensemble.json` says of how they were found."""
    from ray_ensemble.ensemble import learn_weights

    labels = [np.array([example.label for example in stages.held_out(task)]) for task in scores]
    fit = learn_weights(list(scores.values()), labels, [own[task] for task in scores])
    held_out = {
        task: {"examples": len(y), "learned": losses["learned"], "own": losses["prior"], "uniform": losses["uniform"]}
        for task, y, losses in zip(scores, labels, fit.losses, strict=True)
        if losses is not None
    }
    weights = {task: found.tolist() for task, found in zip(scores, fit.weights, strict=True)}
    scales = dict(zip(scores, fit.scales, strict=True))
    return weights, scales, {"shrinkage": {"scale": fit.shared_scale, **fit.choice.described()}, "held_out": held_out}


def evaluate(stages: Stages) -> Outcome:
    """The test split, touched here and only here: base, one QLoRA on all, own group, ensemble (also unboosted, with uniform
    weights, and where the dataset of an input is not known), merged.
    """
    from ray_ensemble.ensemble import ScoreRequest, add_up, coefficients, scale_of, score_all
    from ray_ensemble.evaluation import summarise

    stages.need_ray()
    ensemble = read_json(stages.folder / "ensemble.json", "ensemble")
    names, settings = ensemble["adapters"], stages.config.ensemble
    parts = {task.name: coefficients(ensemble, task.name) for task in stages.encoded}
    unboosted = {task: coefficients({**ensemble, "boosting": {}}, task) for task in parts}
    routed = None
    if settings.router:
        from ray_ensemble.routing import route

        routed = route(stages, parts)
    alike = dict.fromkeys(names, 1.0 / len(names))
    wanted: dict[tuple[str, str], ScoreRequest] = {}
    for task in stages.encoded:
        used = [names[stages.own_group(task.name)], *parts[task.name], *(names if settings.baselines else ())]
        folders: dict[str, Path | None] = {"base": None, "qlora_all": stages.adapter_folder("qlora_all")}
        folders |= {name: stages.scored_adapter(name) for name in used}
        if len(parts[task.name]) > 1 or settings.merged_rank is not None:
            folders["merged"] = stages.folder / "merged" / task.name
        for name, adapter in folders.items():
            wanted[task.name, name] = ScoreRequest(adapter, task, task["test"])
    further = {}
    if routed is not None:
        for (task_name, name), examples in routed.needed.items():
            if (task_name, name) not in wanted:
                task = stages.task(task_name)
                chosen = tuple(task["test"][i] for i in examples)
                further[task_name, name] = ScoreRequest(stages.scored_adapter(name), task, chosen)
    scored = score_all(
        [*wanted.values(), *further.values()],
        stages.spec,
        stages.config.gradients,
        stages.base_hashes,
        stages.folder.path,
        "test scores",
    )
    scores = dict(zip([*wanted, *further], scored.scores, strict=True))
    outputs: dict[str, dict[str, NDArray[Any]]] = {}
    for task in stages.encoded:
        found = {name: scores[task.name, name] for of, name in wanted if of == task.name}
        boosted = add_up(found, parts[task.name])
        outputs[task.name] = {
            "base": found["base"],
            "qlora_all": found["qlora_all"],
            "group": found[names[stages.own_group(task.name)]],
            "ensemble": boosted,
            # With one adapter in use the merged adapter is that adapter.
            "merged": scale_of(ensemble, task.name) * found.get("merged", found[next(iter(parts[task.name]))]),
        }
        if stages.config.boosting.steps:
            outputs[task.name]["ensemble_unboosted"] = add_up(found, unboosted[task.name])
        if settings.baselines:
            outputs[task.name]["uniform"] = add_up(found, alike)
        if routed is not None:
            outputs[task.name]["routed"] = routed.scores(task.name, scores)
    labels = {task.name: np.array([e.label for e in task["test"]]) for task in stages.encoded}
    metrics = summarise(outputs, labels)
    if routed is not None:
        metrics["router"] = routed.figures(outputs, labels)
    peak = {
        stage: stages.folder.facts(stage)["peak_memory_bytes"] for stage in ("gradients", "search", "train", "ensemble")
    }
    metrics["flops"] = _flops(stages)
    metrics["seconds"] = {stage: stages.folder.facts(stage)["seconds"] for stage in STAGES[: STAGES.index("evaluate")]}
    metrics["peak_memory_bytes"] = {**peak, "evaluate": scored.peak_memory_bytes}
    write_json(stages.folder / "metrics.json", metrics)
    return [stages.folder / "metrics.json"], {"peak_memory_bytes": scored.peak_memory_bytes}


def _flops(stages: Stages) -> dict[str, float]:
    from ray_ensemble.evaluation import flops_ratio

    trained = stages.folder.facts("train")["flops"]
    parts = {
        "gradients": stages.folder.facts("gradients")["flops"],
        "search": float(stages.folder.facts("search")["flops"]),
        "groups": sum(value for name, value in trained.items() if name != "qlora_all"),
        "boosting": stages.folder.facts("ensemble").get("boosting_flops", 0.0),
        "ensemble": stages.folder.facts("ensemble")["flops"],
        "merging": stages.folder.facts("ensemble").get("merging_flops", 0.0),
    }
    return {**parts, "qlora_all": trained["qlora_all"], "ratio": flops_ratio(parts, trained["qlora_all"])}
