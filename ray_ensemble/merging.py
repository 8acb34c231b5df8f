"""Merging, in the ensemble stage: each dataset's ensemble as one adapter that predicts as nearly alike as can be.

The combined update is exact, but the base is not linear in it: an adapter of another group that has a small weight may change the
merged model far more than it changes the mean of scores. So several shares of the way to the combination are tried.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_ensemble.ensemble import (
    SHARES,
    VLLM_RANKS,
    Merged,
    ScoreRequest,
    combine,
    divergence,
    ensemble_parts,
    merge_adapters,
    scale_of,
    score_all,
    towards,
)
from ray_ensemble.ensemble.scoring import token_count
from ray_ensemble.evaluation import forward_flops
from ray_ensemble.progress import console
from ray_ensemble.tasks import sample

if TYPE_CHECKING:
    from ray_ensemble.stages import Stages

_TRIED = "merging"  # candidates, in the run folder, where workers see them


@dataclass
class MergedEnsembles:
    """What `merge_ensembles` has written: `told` by dataset for `ensemble.json`, its files, and what it cost."""

    told: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    flops: float = 0.0
    peak_memory_bytes: int = 0


def merge_ensembles(stages: Stages, ensemble: Mapping[str, Any], scored: bool) -> MergedEnsembles:
    """Write `merged/<dataset>/` for every dataset.

    Args:
        stages: of a run whose groups are trained.
        ensemble: what `ensemble.json` will hold: `adapters`, `weights`, `boosting`.
        scored: whether the adapters' scores on held-out examples were computed before, and are paid for.
    """
    settings, done = stages.config.ensemble, MergedEnsembles()
    whole = {task: ensemble_parts(ensemble, task, stages.warm) for task in ensemble["weights"]}
    # The part of the largest weight; boosters, and θ₀ as what they are counted from, are no such parts.
    unboosted = {**ensemble, "boosting": {}}
    main: dict[str, str] = {}
    for task in whole:
        parts = ensemble_parts(unboosted, task, stages.warm)
        main[task] = max((part for part in parts if part is not None), key=lambda part: parts[part])
    several = {task: parts for task, parts in whole.items() if len(parts) > 1}
    scales = {task: scale_of(ensemble, task) for task in several}
    tried = _tried(stages, several, main, scales, scored, done) if several and settings.merge_prompts else {}
    for task, parts in whole.items():
        nearest = min(tried[task], key=lambda share: tried[task][share]) if task in tried else 1.0
        target = stages.folder / "merged" / task
        merged = _merge(stages, towards(parts, main[task], nearest), target)
        done.told[task] = {
            **asdict(merged),
            "vllm_max_lora_rank": merged.vllm_max_lora_rank,
            "share": nearest,
            "divergence": tried[task][nearest] if task in tried else None,
        }
        done.files += sorted(target.iterdir())
    _tell(done.told)
    return done


def _merge(stages: Stages, parts: Mapping[str | None, float], target: Path) -> Merged:
    # The bare base, None, adds nothing to an update.
    used = {stages.folder / part: coefficient for part, coefficient in parts.items() if part is not None}
    return merge_adapters(list(used), list(used.values()), target, stages.config.ensemble.merged_rank)


def _tried(
    stages: Stages,
    whole: Mapping[str, Mapping[str | None, float]],
    main: Mapping[str, str],
    scales: Mapping[str, float],
    scored: bool,
    done: MergedEnsembles,
) -> dict[str, dict[float, float]]:
    """By dataset, the divergence from the ensemble of what each share makes; the largest share first."""
    stages.need_ray()
    settings, folder = stages.config.ensemble, stages.folder / _TRIED
    shutil.rmtree(folder, ignore_errors=True)
    # Where the adapters have scores of all held-out examples, those are taken; else no more are made than are needed.
    most = None if scored else settings.merge_prompts
    examples = {task: sample(stages.held_out(task), most) for task in whole}
    places = {task: list(sample(range(len(found)), settings.merge_prompts)) for task, found in examples.items()}
    known: dict[tuple[str, str | None], ScoreRequest] = {}
    made: dict[tuple[str, float], ScoreRequest] = {}
    for task, parts in whole.items():
        encoded, prompts = stages.task(task), tuple(examples[task][i] for i in places[task])
        for part in parts:
            known[task, part] = ScoreRequest(None if part is None else stages.folder / part, encoded, examples[task])
        for share in SHARES:
            if share or settings.merged_rank is not None:  # else it is the main adapter as it is
                target = folder / task / f"{share:g}"
                _merge(stages, towards(parts, main[task], share), target)
                made[task, share] = ScoreRequest(target, encoded, prompts)
    found = score_all(
        [*known.values(), *made.values()], stages.spec, stages.config.gradients, stages.base_hashes, stages.folder.path,
        "merged adapters",
    )  # fmt: skip
    shutil.rmtree(folder)
    paid = [*made.values(), *(request for (_, part), request in known.items() if part is None or not scored)]
    done.flops = forward_flops(stages.size(), sum(map(token_count, paid)))
    done.peak_memory_bytes = found.peak_memory_bytes
    scores = dict(zip([*known, *made], found.scores, strict=True))
    divergences: dict[str, dict[float, float]] = {}
    for task, parts in whole.items():
        alone = {part: scores[task, part][places[task]] for part in parts}
        wanted = combine(np.stack(list(alone.values())), np.array(list(parts.values())))
        divergences[task] = {
            share: divergence(
                scales[task] * wanted,
                scales[task] * (scores[task, share] if (task, share) in made else alone[main[task]]),
            )
            for share in sorted(SHARES, reverse=True)
        }
    return divergences


def _tell(merged: Mapping[str, Mapping[str, Any]]) -> None:
    """Say what a vLLM server must be started with to serve the merged adapters of all datasets."""
    limits = [entry["vllm_max_lora_rank"] for entry in merged.values()]
    ranks = f"merged adapters: ranks up to {max(entry['rank'] for entry in merged.values())}"
    if None in limits:
        console.print(f"  {ranks}; vLLM serves {VLLM_RANKS[-1]} at most: set ensemble.merged_rank", markup=False)
    else:
        console.print(f"  {ranks}; vLLM serves them with --max-lora-rank {max(limits)}", markup=False)
    if (least := min(entry["norm_kept"] for entry in merged.values())) < 1:
        console.print(f"  cut to that rank; at least {least:.1%} of an update's squared norm is kept", markup=False)
