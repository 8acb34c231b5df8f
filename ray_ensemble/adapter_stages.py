"""The stages that make the result out of the groups: their adapters, the ensemble's weights, the figures on test data."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ray_ensemble.files import read_json, write_json
from ray_ensemble.progress import console
from ray_ensemble.run_folder import STAGES

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
        fresh = StartingPoint(stages.init, stages.planned["adapter"]["hash"])
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
    """Weights of each dataset over the groups' adapters, on the half of its validation data that the search did not see; then
    boosting, which adds to them.
    """
    from ray_ensemble.ensemble import ScoreRequest, combine, ensemble_parts, fit_weights, merge_adapters, score_all
    from ray_ensemble.evaluation import forward_flops

    names = stages.group_names
    learned = stages.config.ensemble.weights == "learned" and len(names) > 1
    boosting = stages.config.boosting.steps > 0
    weights = {task.name: [1.0 / len(names)] * len(names) for task in stages.encoded}
    combined: dict[str, NDArray[np.float64]] = {}
    tokens, peak = 0, 0
    if learned or boosting:
        stages.need_ray()
        requests = [
            ScoreRequest(stages.adapter_folder(name), task, stages.held_out(task.name))
            for task in stages.encoded
            for name in names
        ]
        scored = score_all(
            requests, stages.spec, stages.config.gradients, stages.base_hashes, stages.folder.path, "validation scores"
        )
        tokens, peak = scored.tokens, scored.peak_memory_bytes
        for i, task in enumerate(stages.encoded):
            scores = np.stack(scored.scores[i * len(names) : (i + 1) * len(names)])
            if learned:
                labels = np.array([example.label for example in stages.held_out(task.name)])
                weights[task.name] = fit_weights(scores, labels, stages.own_group(task.name)).tolist()
            combined[task.name] = combine(scores, np.array(weights[task.name]))
    files = [stages.folder / "ensemble.json"]
    facts = {"flops": forward_flops(stages.size(), tokens), "peak_memory_bytes": peak}
    shutil.rmtree(stages.folder / "boosters", ignore_errors=True)
    described: dict[str, Any] = {"steps": stages.config.boosting.steps, "adapters": []}
    if boosting:
        from ray_ensemble.boosting import boost

        boosted = boost(stages, weights, combined)
        described |= boosted.described()
        files += boosted.files
        facts["boosting_flops"] = boosted.flops
        facts["peak_memory_bytes"] = max(peak, boosted.peak_memory_bytes)
    found = {"adapters": names, "weights": weights, "method": stages.config.ensemble.weights, "boosting": described}
    merged: dict[str, dict[str, Any]] = {}
    for name in weights:
        target = stages.folder / "merged" / name
        # The bare base adds nothing to an update.
        parts = {part: share for part, share in ensemble_parts(found, name, stages.warm).items() if part is not None}
        folders = [stages.folder / part for part in parts]
        done = merge_adapters(folders, list(parts.values()), target, stages.config.ensemble.merged_rank)
        merged[name] = {**asdict(done), "vllm_max_lora_rank": done.vllm_max_lora_rank}
        files += sorted(target.iterdir())
    _tell_ranks(merged)
    write_json(stages.folder / "ensemble.json", {**found, "merged": merged})
    return files, facts


def _tell_ranks(merged: Mapping[str, Mapping[str, Any]]) -> None:
    """Say what a vLLM server must be started with to serve the merged adapters of all datasets."""
    from ray_ensemble.ensemble import VLLM_RANKS

    limits = [entry["vllm_max_lora_rank"] for entry in merged.values()]
    ranks = f"merged adapters: ranks up to {max(entry['rank'] for entry in merged.values())}"
    if None in limits:
        console.print(f"  {ranks}; vLLM serves {VLLM_RANKS[-1]} at most: set ensemble.merged_rank", markup=False)
    else:
        console.print(f"  {ranks}; vLLM serves them with --max-lora-rank {max(limits)}", markup=False)
    if (least := min(entry["norm_kept"] for entry in merged.values())) < 1:
        console.print(f"  cut to that rank; at least {least:.1%} of an update's squared norm is kept", markup=False)


def evaluate(stages: Stages) -> Outcome:
    """The test split, touched here and only here: base, one QLoRA on all, own group, ensemble (also unboosted), merged."""
    from ray_ensemble.ensemble import ScoreRequest, booster_scores, boosters_of, combine, score_all
    from ray_ensemble.evaluation import summarise

    stages.need_ray()
    ensemble = read_json(stages.folder / "ensemble.json", "ensemble")
    names, weights, boosting = ensemble["adapters"], ensemble["weights"], ensemble["boosting"]
    wanted: dict[tuple[str, str], ScoreRequest] = {}
    for task in stages.encoded:
        used = [name for name, w in zip(names, weights[task.name], strict=True) if w > 0]
        own = names[stages.own_group(task.name)]
        boosters, _ = boosters_of(boosting, task.name)
        folders: dict[str, Path | None] = {"base": None, "qlora_all": stages.adapter_folder("qlora_all")}
        folders |= {name: stages.adapter_folder(name) for name in dict.fromkeys([*used, own, *boosters])}
        if boosters:
            folders["start"] = stages.start if stages.warm else None
        if len(used) > 1 or boosters or stages.config.ensemble.merged_rank is not None:
            folders["merged"] = stages.folder / "merged" / task.name
        for name, adapter in folders.items():
            wanted[task.name, name] = ScoreRequest(adapter, task, task["test"])
    scored = score_all(
        list(wanted.values()),
        stages.spec,
        stages.config.gradients,
        stages.base_hashes,
        stages.folder.path,
        "test scores",
    )
    scores = dict(zip(wanted, scored.scores, strict=True))
    outputs: dict[str, dict[str, NDArray[Any]]] = {}
    for task in stages.encoded:
        w = np.array(weights[task.name])
        shape = scores[task.name, "base"].shape
        stack = np.stack([scores.get((task.name, name), np.zeros(shape, np.float32)) for name in names])
        only = names[int(w.argmax())]
        boosters, step = boosters_of(boosting, task.name)
        combined = boosted = combine(stack, w)
        if boosters:
            found = np.stack([scores[task.name, name] for name in boosters])
            boosted = combined + step * booster_scores(found, scores[task.name, "start"])
        outputs[task.name] = {
            "base": scores[task.name, "base"],
            "qlora_all": scores[task.name, "qlora_all"],
            "group": scores[task.name, names[stages.own_group(task.name)]],
            "ensemble": boosted,
            # With one adapter in use the merged adapter is that adapter.
            "merged": scores.get((task.name, "merged"), scores[task.name, only]),
        }
        if stages.config.boosting.steps:
            outputs[task.name]["ensemble_unboosted"] = combined
    labels = {task.name: np.array([e.label for e in task["test"]]) for task in stages.encoded}
    metrics = summarise(outputs, labels)
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
    }
    return {**parts, "qlora_all": trained["qlora_all"], "ratio": flops_ratio(parts, trained["qlora_all"])}
