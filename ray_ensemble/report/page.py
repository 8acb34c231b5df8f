"""The sections of `report.html`, in the order in which a reader asks: did it win, where not, why, at what cost, how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_ensemble.report import facts
from ray_ensemble.report.facts import Measure, compact, interval, number, plain
from ray_ensemble.report.load import VARIANTS, RunData
from ray_ensemble.report.markup import Html, bullets, document, element, escape, join, paragraph, section, table
from ray_ensemble.report.method import configuration, datasets, definitions, validation

Figures = Mapping[str, Html]


def page(data: RunData, figures: Figures) -> Html:
    """The whole report; `figures` holds a figure, or the reason why there is none, for every plot."""
    title = f"{len(data.order)} datasets, {len(data.groups)} adapters"
    return document(
        f"ray-ensemble: {title}",
        element("h1", title),
        paragraph(_lead(data), class_="lead"),
        _tiles(data),
        _result(data, figures),
        _shortfalls(data),
        _partition(data, figures),
        _training(data, figures),
        _weights(data),
        _cost(data, figures),
        validation(data),
        definitions(data),
        datasets(data),
        configuration(data),
    )


def note(data: RunData, topic: str) -> Html:
    """What was not there or not readable on a topic."""
    return join(paragraph(line, class_="note") for line in data.notes.get(topic, ()))


def _lead(data: RunData) -> str:
    model = data.plan.get("model") or {}
    about = [str(model.get("source") or data.config.model.source)]
    parameters = model.get("parameters")
    if isinstance(parameters, int | float):
        about.append(f"{parameters / 1e6:,.0f} million parameters")
    about.append(f"quantization {model.get('quantization') or data.config.model.quantization}")
    if model.get("device"):
        about.append(f"on {model['device']}")
    if not data.plan:
        about.append("(there is no plan.json, so nothing more is known about the model)")
    return f"Base model: {plain(', '.join(about))}"


def _tiles(data: RunData) -> Html:
    def tile(label: str, value: str, *lines: str) -> Html:
        return element("div", label, element("b", value), *(element("small", line) for line in lines), class_="tile")

    made = []
    for measure in ("loss", "accuracy"):
        ours, joint = (data.measured(None, name).get(measure) for name in ("ensemble", "qlora_all"))
        found = facts.comparison(data, measure)
        lines = [f"one QLoRA on all: {number(joint)}"]
        if found:
            lines += [f"difference {found.text()}", found.verdict]
        made.append(tile(f"Mean test {measure}, ensemble", number(ours), *lines))
    ratio = facts.flops_ratio(data)
    made.append(tile("Operations, one QLoRA on all = 1", f"{number(ratio, 2)} ×", "test passes of both left out"))
    times = [v for v in (data.metrics.get("seconds") or {}).values() if isinstance(v, int | float)]
    peaks = [v for v in (data.metrics.get("peak_memory_bytes") or {}).values() if isinstance(v, int | float)]
    peak = f"peak memory {facts.size(max(peaks))}" if peaks else "peak memory was not measured"
    made.append(tile("Time, all stages", facts.seconds(sum(times)) if times else "–", peak))
    return element("div", *made, class_="tiles")


def _result(data: RunData, figures: Figures) -> Html:
    variants = data.variants()
    absent = [VARIANTS[name] for name in VARIANTS if name not in variants]
    head: list[object] = ["dataset", "group", "n"]
    for variant in variants:
        for measure in ("loss", "accuracy"):
            head.append(
                join([VARIANTS[variant], element("br"), measure]) if False else f"{VARIANTS[variant]}: {measure}"
            )
    rows = []
    for task in data.order:
        n = next((data.measured(task, variant).get("n") for variant in variants), None)
        cells = [plain(task), plain(data.group_name(data.group_of(task))), compact(n) if n is not None else "–"]
        rows.append([*cells, *_measures(data, task, variants)])
    total = data.measured(None, "ensemble").get("n")
    foot = [
        f"mean of {len(data.order)}",
        "",
        compact(total) if total is not None else "",
        *_measures(data, None, variants),
    ]
    parts: list[object] = [table(head, rows, foot, text=2)]
    if absent:
        parts.append(paragraph(f"Not measured in this run: {', '.join(absent)}.", class_="note"))
    lines = []
    for measure in ("loss", "accuracy"):
        found = facts.comparison(data, measure)
        if found:
            lines.append(f"{measure.capitalize()}, ensemble − one QLoRA on all: {found.text()}: {found.verdict}.")
        else:
            lines.append(f"{measure.capitalize()}: ensemble and one QLoRA on all were not both measured.")
    for pair, found_pair in sorted((data.metrics.get("paired") or {}).items()):
        if pair != "ensemble_vs_qlora_all" and isinstance(found_pair, dict):
            ours, _, theirs = str(pair).partition("_vs_")
            names = f"{VARIANTS.get(ours, ours)} − {VARIANTS.get(theirs, theirs)}"
            for measure in ("loss", "accuracy"):
                each = found_pair.get(measure) or {}
                span = interval(each.get("interval"), sign=True)
                lines.append(f"{measure.capitalize()}, {names}: {number(each.get('difference'), sign=True)} {span}")
    return section(
        "Result on the test splits",
        *parts,
        paragraph("Under each figure: its 95% interval. Bold: best of base, one QLoRA on all and ensemble."),
        bullets(lines),
        figures["test"],
    )


def _measures(data: RunData, task: str | None, variants: list[str]) -> list[Html]:
    cells = []
    for variant in variants:
        found = data.measured(task, variant)
        for measure in ("loss", "accuracy"):
            value = escape(number(found.get(measure)))
            if _is_best(data, task, variant, measure):
                value = element("b", value)
            span = interval(found.get(f"{measure}_interval"))
            cells.append(element("td", value, element("small", span) if span else "", class_="n"))
    return cells


def _is_best(data: RunData, task: str | None, variant: str, measure: Measure) -> bool:
    rivals = {name: data.measured(task, name).get(measure) for name in ("base", "qlora_all", "ensemble")}
    known = {name: value for name, value in rivals.items() if isinstance(value, int | float)}
    if variant not in known:
        return False
    return known[variant] == (min if measure == "loss" else max)(known.values())


def _shortfalls(data: RunData) -> Html:
    """Everything in which the ensemble fell short, by name; silence about it would make the rest worthless."""
    lines: list[object] = []
    for over in ("qlora_all", "base"):
        for measure in ("loss", "accuracy"):
            found = facts.worse(data, measure, over)
            if found:
                names = ", ".join(f"{plain(task)} ({number(by)})" for task, by in found)
                text = (
                    f"Ensemble worse than {VARIANTS[over]} in {measure} on {len(found)} of {len(data.order)}: {names}."
                )
                lines.append(text)
    ratio = facts.flops_ratio(data)
    if ratio is None:
        lines.append("Operations were not counted, so nothing can be said about the cost against one QLoRA on all.")
    elif ratio > 1:
        lines.append(f"It took {number(ratio, 2)} times the operations of one QLoRA on all data.")
    pairs = facts.estimated_and_real(data)
    if pairs:
        over_promised = [task for task, estimate, real in pairs if real > estimate]
        error = sum(abs(estimate - real) / real for _, estimate, real in pairs if real > 0) / len(pairs)
        lines.append(
            f"The estimate promised a lower loss than training reached on {len(over_promised)} of {len(pairs)} datasets; "
            f"|estimated − test loss| / test loss averages {number(100 * error, 1)}% "
            "(other examples too: estimates are of the validation split)."
        )
    cut = [(task, entry.get("truncated")) for task, entry in data.tasks.items() if entry.get("truncated")]
    if cut:
        names = ", ".join(f"{plain(task)} ({compact(count)})" for task, count in cut)
        lines.append(f"Prompts shortened to fit {data.config.limits.max_tokens} tokens: {names}.")
    clear = not any(facts.worse(data, measure) for measure in ("loss", "accuracy"))
    opening = (
        paragraph("The ensemble is worse than one QLoRA on all on no dataset, in loss or accuracy.") if clear else ""
    )
    remark = "One dataset's difference is seldom beyond chance: see the intervals above."
    return section("What fell short", opening, bullets(lines), paragraph(remark, class_="muted"))


def _partition(data: RunData, figures: Figures) -> Html:
    rows = []
    for index, group in enumerate(data.groups):
        members = join(element("span", plain(task), class_="group") for task in group)
        rows.append([plain(data.group_name(index)), members])
    found = data.partition
    about = [f"Method {compact(found.get('method', '–'))}, seed {compact(found.get('seed', '–'))}."]
    if isinstance(found.get("objective"), int | float):
        kind = "1 − accuracy" if found.get("metric") == "accuracy" else "loss"
        search = found.get("search_objective")
        half = f" ({number(search)} on the half that the search used)" if isinstance(search, int | float) else ""
        about.append(f"Estimated mean validation {kind}: {number(found['objective'])}{half}.")
    info = data.affinity_info
    about.append(
        f"Affinity from {compact(info.get('subsets', '?'))} sampled subsets of {compact(info.get('subset_size', '?'))} datasets, "
        "estimated without training."
    )
    return section(
        f"The partition: {len(data.groups)} groups",
        table(["group", "datasets"], rows, text=2),
        paragraph(" ".join(about)),
        figures["affinity"],
        element("h3", "Choosing the number of groups"),
        note(data, "search"),
        figures["search"],
    )


def _training(data: RunData, figures: Figures) -> Html:
    train = data.config.training
    text = (
        f"{train.epochs} epochs or {train.min_steps} steps, whichever is more, in batches of {train.batch_size}; learning rate "
        f"{train.learning_rate:g} ({train.schedule}); LoRA rank {data.config.adapter.rank} on "
        f"{', '.join(data.config.adapter.target_modules)}. The one QLoRA on all data gets as many steps as all groups together."
    )
    return section(
        "Training",
        paragraph(plain(text)),
        note(data, "training"),
        figures["training"],
        element("h3", "Promise and outcome"),
        figures["estimates"],
    )


def _weights(data: RunData) -> Html:
    weights = data.ensemble.get("weights") or {}
    rows = []
    for task in data.order:
        cells: list[object] = [plain(task)]
        for value in weights.get(task) or []:
            share = min(max(float(value), 0.0), 1.0)
            text = number(value, 2) if value else "0"
            cells.append(element("td", text, class_="n w", style=f"--share:{share:.3f}"))
        rows.append(cells)
    parts: list[object] = []
    if weights:
        parts.append(table(["dataset", *map(plain, data.adapters)], rows))
        how = data.config.ensemble.weights
        parts.append(
            paragraph(f"A row holds the weight of each adapter in that dataset's score ({how}, fitted on validation).")
        )
    else:
        parts.append(paragraph("ensemble.json holds no weights.", class_="note"))
    boosting: Any = data.ensemble.get("boosting")
    text = compact(boosting) if boosting else "no boosting steps"
    parts.append(paragraph(f"Boosting: {text}."))
    return section("Weights of the ensemble", *parts)


def _cost(data: RunData, figures: Figures) -> Html:
    reference = facts.flops_reference(data)
    rows: list[list[object]] = []
    for part in facts.flops_parts(data):
        share = number(part.flops / reference, 3) if reference else "–"
        rows.append([part.name, facts.operations(part.flops), share])
    parts: list[object] = []
    if rows:
        foot = ["one QLoRA on all", facts.operations(reference), "1"]
        parts.append(table(["operations", "", "of one QLoRA on all"], rows, foot))
    else:
        parts.append(paragraph("metrics.json holds no operations.", class_="note"))
    times = data.metrics.get("seconds") or {}
    peaks = data.metrics.get("peak_memory_bytes") or {}
    stages = [*times, *(stage for stage in peaks if stage not in times)]
    if stages:
        head = ["stage", "time", "peak memory"]
        cells = [[plain(stage), facts.seconds(times.get(stage)), facts.size(peaks.get(stage))] for stage in stages]
        parts.append(table(head, cells))
    else:
        parts.append(paragraph("metrics.json holds neither seconds nor memory by stage.", class_="note"))
    return section("What it cost", figures["cost"], *parts)
