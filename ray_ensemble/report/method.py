"""The sections of `report.html` that say how things were measured: definitions, seeds, data, validation, configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ray_ensemble.report.facts import compact, plain
from ray_ensemble.report.load import RunData
from ray_ensemble.report.markup import Html, bullets, element, join, paragraph, section, table

_TERMS = {
    "Score and loss": (
        "The score of a label word is the sum of the model's log-probabilities over the tokens of the word after the prompt, "
        "without length normalisation. Loss is −log softmax(scores) of the right label, in nats: an even guess among K labels "
        "has ln K. The same definition serves estimate, training, metrics and prediction."
    ),
    "Accuracy": "Share of examples on which the right label has the highest score.",
    "Macro-F1": (
        "Mean over a dataset's classes of F1 = 2·TP / (2·TP + FP + FN); a class that is neither label nor prediction of any "
        "example does not count."
    ),
    "Calibration error": (
        "Expected calibration error of the prediction, in 15 bins of equal width of its probability: sum over bins of "
        "|hits − sum of probabilities| / n. Above zero on few examples even for a calibrated model."
    ),
    "Mean": "Every dataset counts the same, whatever its size.",
    "Intervals": (
        "95%. Loss: percentile bootstrap over test examples, 2,000 resamples. Accuracy: Wilson. "
        "Calibration error: basic bootstrap. Differences: paired bootstrap, "
        "the same examples redrawn within each dataset for both models. They cover the choice of test examples, "
        "not the seeds of training."
    ),
    "One QLoRA on all": (
        "A single adapter trained on all datasets together, with the same total number of optimiser steps and examples as all "
        "groups together."
    ),
    "Ensemble": (
        "Score = β·Σ w·s over the groups' adapters and a trained common start, the weights w ≥ 0 summing to 1; weights and the "
        "scale β (an inverse temperature) are fitted per dataset on validation examples; "
        "plus η·(s_booster − s_start) for each booster of the dataset's group, η ≥ 0 fitted likewise. "
        "“Own group's adapter” is the dataset's own group alone; “merged” is the weighted ensemble folded into one adapter, "
        "which equals the ensemble to first order only."
    ),
    "FLOPs ratio": (
        "(gradients + search + training of the groups + boosting + validation passes for the weights + merging) / (one QLoRA on "
        "all data, same total steps and examples as all groups together). Evaluation on test is left out of both. Counted: "
        "forward 2·N·tokens, backward to activations 2·N·tokens, and the adapters' own terms, N being the parameters without the "
        "embedding table."
    ),
    "Estimate": (
        "Gradients of the margin at the adapters' common start, projected; a group's fine-tuning is modelled as a regularised "
        "logistic regression on them. Half of each validation split serves search and regularisation, the other half the "
        "weights and the objective that is reported."
    ),
    "Test split": "Touched once, at the end, by all models at the same time. No choice was made on it.",
}

_VALIDATION = {
    "approximation_error": "Σ(f_θ − f₀ − g·(θ−θ₀))² / Σ f_θ², at the relative distance ρ of θ from θ₀",
    "approximation_error_of_change": "the same with Σ(f_θ − f₀)² below",
    "loss_error": "|estimated − true| / true loss over fine-tuned subsets, raw",
    "loss_error_calibrated": "the same after calibration",
    "accuracy_error": "|estimated − true| / true accuracy",
    "accuracy_error_points": "|estimated − true| accuracy, in points",
    "spearman": "rank correlation of estimate and truth over all (subset, dataset), each dataset's mean taken off both",
}


def definitions(data: RunData) -> Html:
    """What each word means, seeds and sizes."""
    config = data.config
    seeds = {
        "adapters' start": config.adapter.seed,
        "projection": config.gradients.seed,
        "sampled subsets": config.estimator.seed,
        "search": config.search.seed,
        "chosen partition": data.partition.get("seed", "–"),
        "training": config.training.seed,
    }
    terms = join(join([element("dt", term), element("dd", text)]) for term, text in _TERMS.items())
    drawn = ", ".join(f"{name} {compact(seed)}" for name, seed in seeds.items())
    dim = f"Projected dimension d = {config.gradients.dim}."
    return section("How it was measured", element("dl", terms), paragraph(f"Seeds: {drawn}. {dim}"))


def datasets(data: RunData) -> Html:
    """Sizes, labels and hashes of the data."""
    rows: list[list[object]] = []
    for task, entry in data.tasks.items():
        labels = [plain(label, 40) for label in entry.get("labels") or []]
        shown = ", ".join(labels[:12]) + (f" … ({len(labels)})" if len(labels) > 12 else "")
        sizes = [_known(entry.get(key)) for key in ("train", "validation", "test", "truncated")]
        tokens = entry.get("mean_tokens")
        mean = f"{tokens:.0f}" if isinstance(tokens, int | float) else "–"
        rows.append([plain(task), shown or "–", *sizes, mean, plain(_known(entry.get("data_hash")))[:12]])
    head = ["dataset", "label words", "train", "validation", "test", "shortened", "mean tokens", "data hash"]
    return section("Datasets", table(head, rows, text=2))


def _known(value: Any) -> str:
    return "–" if value is None else compact(value)


def validation(data: RunData, plot: Html) -> Html:
    """The errors of the first-order estimate against real fine-tuning, or that they were not measured."""
    title = "Validation of the estimate"
    notes = join(paragraph(line, class_="note") for line in data.notes.get("validation", ()))
    found = data.validation
    if found is None:
        said = (
            "No validation was run: how far the estimate is off on really fine-tuned subsets is not known for this job."
        )
        return section(title, notes, paragraph(said, class_="note"))
    ceiling = found.get("seed_to_seed")
    ceiling = ceiling if isinstance(ceiling, dict) else {}
    shown = [(key, value) for key, value in _leaves(found) if "." not in key]
    rows = [
        [key, compact(value), _known(ceiling.get(key)), _VALIDATION.get(key, "")] for key, value in shown if value != []
    ]
    parts: list[object] = [table(["", "estimate", "seed to seed", "definition"], rows, text=3)]
    parts.append(paragraph("No estimate can be better than what a second seed of the same training gives."))
    linear = [row for row in found.get("approximation") or [] if isinstance(row, dict)]
    if linear:
        keys = ("distance", "model_distance", "approximation_error", "approximation_error_of_change")
        cells = [[plain(row.get("direction", "–")), *(_known(row.get(key)) for key in keys)] for row in linear]
        parts += [
            element("h3", "Linearity"),
            table(["along", "distance ρ", "of the whole model", "error", "error of change"], cells),
            bullets([f"{key}: {_VALIDATION[key]}." for key in keys[2:]]),
        ]
    return section(title, *parts, plot)


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of nested mappings as `a.b -> value`; lists of plain values stay whole, longer ones are left out."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    elif not (isinstance(value, list) and (len(value) > 4 or any(isinstance(x, dict | list) for x in value))):
        yield prefix, value


def configuration(data: RunData) -> Html:
    """The resolved job, as it can be run again."""
    text = element("pre", data.config_text)
    plan = "".join(f"{key}: {compact(value)}\n" for key, value in data.plan.items())
    parts = [element("details", element("summary", "config.yaml, resolved"), text)]
    if plan:
        parts.append(element("details", element("summary", "plan.json"), element("pre", plan)))
    else:
        parts.append(paragraph("This run folder has no plan.json.", class_="note"))
    return section("Configuration", *parts)
