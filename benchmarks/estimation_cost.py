"""What the estimate costs against fine-tuning for real: the `cost` part of `estimation.py`."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ray_ensemble.estimator import Estimator, choose_regularization
from ray_ensemble.estimator.affinity import job_subsets
from ray_ensemble.evaluation import training_flops
from ray_ensemble.evaluation.flops import gradient_flops
from ray_ensemble.gradients.per_example import GradientCollector
from ray_ensemble.gradients.projection import Projection, signs_per_element
from ray_ensemble.models import (
    LabelTree,
    attach_adapters,
    default_device,
    label_scores,
    load_base,
    make_batch,
    materialise,
)
from ray_ensemble.models.scoring import score_loss
from ray_ensemble.real_runs import RealRun
from ray_ensemble.report.tables import text_table
from ray_ensemble.stages import Stages
from ray_ensemble.tasks import EncodedTask

TIMED_EXAMPLES = 4  # of each task, in one batch


@dataclass(frozen=True)
class Protocol:
    """Examples a task for training and validation, and epochs."""

    train: int
    validation: int
    epochs: int


PROTOCOLS = {
    "paper: 500/100 examples, 10 epochs": Protocol(500, 100, 10),
    "160/80 examples, 10 epochs": Protocol(160, 80, 10),
}


def mean_tokens(task: EncodedTask) -> float:
    """Tokens of a training example: its prompt, and the labels' once for all of them."""
    nodes = len(LabelTree.of(task.label_ids).tokens)
    return sum(len(e.prompt_ids) + nodes for e in task["train"]) / len(task["train"])


@dataclass(frozen=True)
class Variant:
    """How gradients are taken: steps of the common start (0: a fresh one), and what is differentiated."""

    meta_steps: int
    targets: str

    @property
    def name(self) -> str:
        """As the table calls it."""
        start = f"meta start, {self.meta_steps} steps" if self.meta_steps else "fresh start"
        return f"{start}, {self.targets}"


def gradient_count(task: EncodedTask, protocol: Protocol, targets: str) -> int:
    """Backward passes of one task's examples; validation examples take all differences of scores (DESIGN section 2.2)."""
    differences = len(task.labels) - 1
    return protocol.train * (differences if targets == "pairwise" else 1) + protocol.validation * differences


def pass_flops(stages: Stages, protocol: Protocol, variant: Variant) -> float:
    """Operations of the gradient pass over all tasks and of the common start's training."""
    settings, tasks = stages.config.gradients, stages.encoded
    tokens = [mean_tokens(task) for task in tasks]
    counts = [gradient_count(task, protocol, variant.targets) for task in tasks]
    forward = (protocol.train + protocol.validation) * sum(tokens)
    backward = sum(count * each for count, each in zip(counts, tokens, strict=True))
    size = stages.size(None if variant.meta_steps else "lora_B")
    signs = signs_per_element(settings.projection, settings.dim, stages.config.adapter.rank)
    warm = variant.meta_steps * stages.config.training.batch_size * sum(tokens) / len(tokens)
    gradients = gradient_flops(size, round(forward), round(backward), sum(counts), signs)
    return gradients + training_flops(stages.size(), round(warm))


def cost(stages: Stages, runs: Sequence[RealRun], rounds: int) -> dict[str, Any]:
    """Operations and seconds of both ways; see the table's caption."""
    estimator_seconds, estimator_flops = fitted(stages)
    visit, gradient = timed(stages, rounds)
    size, tasks = stages.size(), stages.encoded
    training, settings = stages.config.training, stages.config.gradients
    subsets = job_subsets(stages.features(), stages.config.estimator)
    everything = [mean_tokens(task) for task in tasks]
    own = Variant(settings.meta_steps if settings.start == "meta" else 0, settings.targets)
    variants = dict.fromkeys([own, Variant(0, "pairwise"), Variant(0, "margin")])
    found: dict[str, Any] = {
        "seconds_of_a_training_example": visit,
        "seconds_of_a_gradient": gradient,
        "fits": {"seconds": estimator_seconds, "flops": estimator_flops, "subsets": len(subsets)},
        "protocols": {},
    }
    for name, protocol in PROTOCOLS.items():
        visits = sum(protocol.epochs * protocol.train for members in subsets for _ in members)
        tokens = sum(protocol.epochs * protocol.train * everything[i] for members in subsets for i in members)
        real = training_flops(size, round(tokens))
        for variant in variants:
            estimate = pass_flops(stages, protocol, variant) + estimator_flops
            gradients = sum(gradient_count(task, protocol, variant.targets) for task in tasks)
            warm = variant.meta_steps * training.batch_size * visit["median"]
            seconds = gradients * gradient["median"] + estimator_seconds + warm
            found["protocols"][f"{name}; {variant.name}"] = {
                "flops": {"fine_tuning": real, "estimate": estimate},
                "flops_ratio": real / estimate,
                "seconds": {"fine_tuning": visits * visit["median"], "estimate": seconds},
                "seconds_ratio": visits * visit["median"] / seconds,
            }
    found["search"] = {
        f"{epochs} epochs": searched(stages, everything, epochs, visit["median"]) for epochs in (training.epochs, 10)
    }
    found["measured_training_seconds"] = sum(run.seconds for run in runs)
    return found


def searched(stages: Stages, tokens: Sequence[float], epochs: int, visit: float) -> dict[str, Any]:
    """Every group that the search scored, trained for so many epochs, against this job's gradient stage and search."""
    names = {task.name: i for i, task in enumerate(stages.encoded)}
    rows = [json.loads(line) for line in (stages.folder / "search" / "fits.jsonl").read_text().splitlines()[1:]]
    training, size = stages.config.training.model_copy(update={"epochs": epochs}), stages.size()
    visits, total = 0, 0.0
    for row in rows:
        members = row["members"]
        examples = training.steps(sum(len(stages.encoded[i]["train"]) for i in members)) * training.batch_size
        visits += examples
        total += training_flops(size, round(examples * sum(tokens[i] for i in members) / len(members)))
    facts = {stage: stages.folder.facts(stage) for stage in ("gradients", "search")}
    spent = sum(fact["flops"] for fact in facts.values())
    seconds = sum(fact["seconds"] for fact in facts.values())
    return {
        "tasks": len(names),
        "groups": len(rows),
        "flops": {"fine_tuning": total, "estimate": spent},
        "flops_ratio": total / spent,
        "seconds": {"fine_tuning": visits * visit, "estimate": seconds},
        "seconds_ratio": visits * visit / seconds,
    }


def fitted(stages: Stages) -> tuple[float, float]:
    """Seconds and operations of choosing λ and fitting the sampled subsets."""
    features, settings = stages.features(), stages.config.estimator
    subsets = job_subsets(features, settings)
    started = time.perf_counter()
    choice = choose_regularization(features, stages.config.training, subsets, settings.seed)
    estimator = Estimator(features, stages.config.training, choice.value)
    estimator.groups(subsets)
    return time.perf_counter() - started, float(choice.flops + estimator.flops)


def timed(stages: Stages, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a training example's visit and of one gradient, in turns on the same examples and one thread."""
    torch.set_num_threads(1)
    device, spec, settings = default_device(), stages.spec, stages.config.gradients
    batches = []
    for task in stages.encoded:
        tree = LabelTree.of(task.label_ids)
        examples = list(task["train"][:TIMED_EXAMPLES])
        batches.append(make_batch(examples, [tree] * len(examples), len(task.labels), spec.pad_id, device))
    visits = sum(batch.size for batch in batches)
    gradients = sum(batch.size * (batch.classes - 1) for batch in batches)

    def loaded(trainable: str | None) -> Any:
        base = load_base(materialise(spec.source), spec.quantization, device)
        return attach_adapters(base, {"default": Path(spec.initial_adapter)}, trainable=trainable)

    learner = loaded("default")
    parameters = [p for p in learner.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-6)
    projection = Projection(settings.dim, settings.seed, device, settings.projection)
    collector = GradientCollector(loaded(None), projection)

    def train() -> None:
        for batch in batches:
            score_loss(label_scores(learner, batch), batch.labels).mean().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def collect() -> None:
        for batch in batches:
            collector.collect([batch], "classes")

    seconds: dict[Callable[[], None], list[float]] = {train: [], collect: []}
    for r in range(rounds + 1):  # the first round pages the weights in
        for work in (train, collect) if r % 2 else (collect, train):
            started = time.perf_counter()
            work()
            if r:
                seconds[work].append(time.perf_counter() - started)
    return spread(seconds[train], visits), spread(seconds[collect], gradients)


def spread(seconds: Sequence[float], count: int) -> dict[str, float]:
    """Median, smallest and largest of one of `count`."""
    return {
        "median": statistics.median(seconds) / count,
        "min": min(seconds) / count,
        "max": max(seconds) / count,
    }


def print_cost(found: dict[str, Any]) -> None:
    """How many times cheaper the estimate is."""
    table = text_table(
        title="Fine-tuning for real against gradient pass and fits (the common start included)",
        caption="seconds: medians of one training example and one gradient on one thread, times their numbers, and the fits",
    )
    table.add_column("")
    for name in ("TFLOPs, trained", "estimated", "ratio", "seconds, trained", "estimated", "ratio"):
        table.add_column(name, justify="right")
    search = found["search"]
    searches = {f"all {row['groups']} groups of the search, {epochs}": row for epochs, row in search.items()}
    rows = {**found["protocols"], **searches}
    for name, row in rows.items():
        flops, seconds = row["flops"], row["seconds"]
        table.add_row(
            name,
            f"{flops['fine_tuning'] / 1e12:,.0f}",
            f"{flops['estimate'] / 1e12:,.1f}",
            f"{row['flops_ratio']:,.0f}",
            f"{seconds['fine_tuning']:,.0f}",
            f"{seconds['estimate']:,.0f}",
            f"{row['seconds_ratio']:,.0f}",
        )
    Console(width=150, highlight=False).print(table)
