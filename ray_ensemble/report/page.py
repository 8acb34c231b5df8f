"""The sections of `report.html`, in the order in which a reader asks: did it win, where not, why, at what cost, how."""

from __future__ import annotations

from collections.abc import Mapping

from ray_ensemble.report import facts
from ray_ensemble.report.facts import MEASURES, change, compact, measured, number, plain, span
from ray_ensemble.report.load import RIVALS, VARIANTS, RunData
from ray_ensemble.report.markup import Html, bullets, document, element, escape, join, paragraph, section, table
from ray_ensemble.report.method import configuration, datasets, definitions, validation

Figures = Mapping[str, Html]


def page(data: RunData, figures: Figures) -> Html:
    """The whole report; `figures` holds a figure, or the reason why there is none, for every plot."""
    title = f"{facts.count(len(data.order), 'dataset')}, {facts.count(len(data.groups), 'group')}"
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
        validation(data, figures["validation"]),
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
    for measure in MEASURES:
        ours, joint = (data.measured(None, name).get(measure) for name in ("ensemble", "qlora_all"))
        found = facts.comparison(data, measure)
        lines = [f"one QLoRA on all: {measured(measure, joint)}"]
        if found:
            lines += [f"difference {found.text()}", found.verdict]
        made.append(tile(f"Ensemble, mean test {measure}", measured(measure, ours), *lines))
    ratio = facts.flops_ratio(data)
    made.append(tile("FLOPs ratio", f"{number(ratio, 2)} ×", "one QLoRA on all = 1", "evaluation on test left out"))
    times, peaks = facts.figures(data, "seconds").values(), facts.figures(data, "peak_memory_bytes").values()
    peak = f"peak memory {facts.size(max(peaks))}" if peaks else "peak memory was not measured"
    made.append(tile("Time, all stages", facts.seconds(sum(times)) if times else "–", peak))
    return element("div", *made, class_="tiles")


def _result(data: RunData, figures: Figures) -> Html:
    variants = data.variants()
    settings = data.config.ensemble
    asked = {"ensemble_unboosted": data.config.boosting.steps, "uniform": settings.baselines, "routed": settings.router}
    expected = [name for name in VARIANTS if asked.get(name, True)]
    absent = [VARIANTS[name] for name in expected if name not in variants]
    parts: list[object] = [_table(data, [name for name in variants if name in RIVALS])]
    relatives = [name for name in variants if name not in RIVALS]
    if relatives:
        parts += [element("h3", "The ensemble's parts and its merged form"), _table(data, relatives)]
    parts += _merged(data)
    if absent:
        parts.append(paragraph(f"Not measured in this run: {', '.join(absent)}.", class_="note"))
    called = {variant: VARIANTS[variant] for variant in variants}
    lines = [
        f"{measure.capitalize()}, mean over datasets: {text}." for measure, text in facts.means(data, called).items()
    ]
    for measure in MEASURES:
        found = facts.comparison(data, measure)
        if found:
            lines.append(f"{measure.capitalize()}, ensemble − one QLoRA on all: {found.text()}: {found.verdict}.")
        else:
            lines.append(f"{measure.capitalize()}: ensemble and one QLoRA on all were not both measured.")
    for pair, found_pair in sorted((data.metrics.get("paired") or {}).items()):
        if pair != "ensemble_vs_qlora_all" and isinstance(found_pair, dict):
            ours, _, theirs = str(pair).partition("_vs_")
            names = f"{VARIANTS.get(ours, ours)} − {VARIANTS.get(theirs, theirs)}"
            for measure in MEASURES:
                each = found_pair.get(measure) or {}
                text = change(measure, each.get("difference"), each.get("interval"))
                lines.append(f"{measure.capitalize()}, {names}: {text}.")
    return section(
        "Result on the test splits",
        *parts,
        paragraph("Under each figure: its 95% interval. Bold: best of base, one QLoRA on all and ensemble."),
        bullets(lines),
        figures["test"],
    )


def _merged(data: RunData) -> list[object]:
    """What merging changes on every dataset; nothing where it was not measured."""
    compared = ((data.metrics.get("paired") or {}).get("merged_vs_ensemble") or {}).get("tasks") or {}
    if not compared:
        return []
    told = data.ensemble.get("merged") or {}
    rows: list[list[object]] = []
    for task in data.order:
        merged, pair = told.get(task) or {}, compared.get(task) or {}
        kept = merged.get("norm_kept")
        cells = [
            change(m, (pair.get(m) or {}).get("difference"), (pair.get(m) or {}).get("interval")) for m in MEASURES
        ]
        share = number(merged.get("share"), 2)
        rows.append([plain(task, 40), merged.get("rank", "–"), share, measured("accuracy", kept), *cells])
    limits = [merged.get("vllm_max_lora_rank") for merged in told.values()]
    serving = f" vLLM serves them with --max-lora-rank {max(limits)}." if limits and None not in limits else ""
    head = ["dataset", "rank", "share", "squared norm kept", *(f"merged − ensemble: {measure}" for measure in MEASURES)]
    note = (
        "Rank of each dataset's merged adapter; its share of the way from the main adapter (0) to the ensemble's weights (1), "
        f"the one that predicts most like the ensemble; and the paired difference on the same test examples.{serving}"
    )
    return [table(head, rows), paragraph(note, class_="note")]


def _table(data: RunData, variants: list[str]) -> Html:
    """Datasets by variants: loss and accuracy with their intervals, and the means."""
    head = [
        "dataset",
        "group",
        "n",
        *(f"{VARIANTS[variant]}: {measure}" for variant in variants for measure in MEASURES),
    ]
    rows: list[list[object]] = []
    for task in data.order:
        sizes = [data.measured(task, variant).get("n") for variant in variants]
        n = next((compact(size) for size in sizes if size is not None), "–")
        rows.append([plain(task), plain(data.group_name(data.group_of(task))), n, *_measures(data, task, variants)])
    total = next((data.measured(None, variant).get("n") for variant in variants), None)
    means = _measures(data, None, variants)
    foot = [f"mean of {len(data.order)}", "", "" if total is None else compact(total), *means]
    return table(head, rows, foot, text=2)


def _measures(data: RunData, task: str | None, variants: list[str]) -> list[Html]:
    cells = []
    for variant in variants:
        found = data.measured(task, variant)
        for measure in MEASURES:
            value = escape(measured(measure, found.get(measure)))
            if facts.is_best(data, task, variant, measure):
                value = element("b", value)
            around = span(measure, found.get(f"{measure}_interval"))
            cells.append(element("td", value, element("small", around) if around else "", class_="n"))
    return cells


def _shortfalls(data: RunData) -> Html:
    """Everything in which the ensemble fell short, by name; silence about it would make the rest worthless."""
    lines: list[object] = []
    for over in ("qlora_all", "base"):
        for measure in MEASURES:
            found = facts.worse(data, measure, over)
            if found:
                # A loss that is too high stands with a plus, an accuracy that is too low with a minus.
                sign = 1 if measure == "loss" else -1
                names = ", ".join(f"{plain(task)} ({change(measure, sign * by)})" for task, by in found)
                text = (
                    f"Ensemble worse than {VARIANTS[over]} in {measure} on {len(found)} of {len(data.order)}: {names}."
                )
                lines.append(text)
    ratio = facts.flops_ratio(data)
    if ratio is None:
        lines.append("FLOPs were not counted, so nothing can be said about the cost against one QLoRA on all.")
    elif ratio > 1:
        lines.append(f"It took {number(ratio, 2)} times the FLOPs of one QLoRA on all data.")
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
    compared = [task for task in data.order if facts.gain(data, task, "loss") is not None]
    clear = bool(compared) and not any(facts.worse(data, measure) for measure in MEASURES)
    if clear:
        lines.insert(
            0, "No dataset has a higher loss or a lower accuracy with the ensemble than with one QLoRA on all."
        )
    if len(compared) < len(data.order):
        missing = len(data.order) - len(compared)
        lines.append(
            f"{missing} of {len(data.order)} datasets lack a measurement of the ensemble or of one QLoRA on all."
        )
    remark = "" if clear else "On one dataset such differences are often within chance: its intervals above tell."
    return section("What fell short", bullets(lines), paragraph(remark, class_="muted"))


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
        f"The partition: {facts.count(len(data.groups), 'group')}",
        table(["group", "datasets"], rows, text=2),
        paragraph(" ".join(about)),
        _harm(data),
        _unlearnt(data),
        figures["affinity"],
        element("h3", "Choosing the number of groups"),
        note(data, "search"),
        figures["search"],
    )


def _harm(data: RunData) -> Html:
    """The datasets that every group is estimated to be better without, by name; nothing where none was looked for."""
    if not isinstance(data.partition.get("harmful"), list):
        return Html("")
    lines = []
    for harm in data.partition["harmful"]:
        partners = facts.count(int(harm["partners"]), "other dataset")
        cost = f"{number(-harm['effect'])} ± {number(harm['standard_error'])}"
        lines.append(
            f"{plain(harm['task'])} harms what trains beside it: joining their groups costs {partners} {cost} of estimated "
            f"loss on the mean ({compact(harm['better'])} gain). Look at its labels, or leave it out."
        )
    if not lines:
        return paragraph("No dataset was found to harm every group that it could join.", class_="muted")
    return join([element("h3", "Datasets that do harm"), bullets(lines)])


def _unlearnt(data: RunData) -> Html:
    """The datasets that no training is estimated to teach anything, by name."""
    lines = [
        f"{plain(each['task'])}: {number(each['gain'], sign=True)} ± {number(each['standard_error'])}"
        for each in data.partition.get("unlearnt") or []
    ]
    if not lines:
        return Html("")
    about = (
        "By the estimate their groups' training predicts these no better than the frequencies of their labels do (gain in "
        "nats over that, with its standard error). Their labels may be wrong, the task too hard for this base, or the data "
        "too few to tell."
    )
    return join([element("h3", "Datasets that are not learnt"), paragraph(about), bullets(lines)])


def _training(data: RunData, figures: Figures) -> Html:
    train = data.config.training
    warm = " and the common start" if data.config.gradients.start == "meta" else ""
    text = (
        f"{train.epochs} epochs or {train.min_steps} steps, whichever is more, in batches of {train.batch_size}; learning rate "
        f"{train.learning_rate:g} ({train.schedule}); LoRA rank {data.config.adapter.rank} on "
        f"{', '.join(data.config.adapter.target_modules)}. The one QLoRA on all data gets as many steps as all groups{warm} "
        "together."
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
    weights, scales = data.ensemble.get("weights") or {}, data.ensemble.get("scales") or {}
    rows = []
    for task in data.order:
        cells: list[object] = [plain(task)]
        for value in weights.get(task) or []:
            share = min(max(float(value), 0.0), 1.0)
            text = number(value, 2) if value else "0"
            cells.append(element("td", text, class_="n w", style=f"--share:{share:.3f}"))
        rows.append([*cells, number(scales.get(task, 1.0), 2)])
    parts: list[object] = []
    if weights:
        parts.append(table(["dataset", *map(plain, data.ensemble["adapters"]), "scale"], rows))
        origin = {
            "learned": "fitted on the dataset's validation examples, held back towards its own group",
            "own": "all on the dataset's own group, not fitted",
            "uniform": "all equal, not fitted",
        }[data.config.ensemble.weights]
        parts += [
            paragraph(f"A row holds the weight of each adapter in that dataset's score; {origin}."),
            paragraph(
                "The sum is multiplied by the scale, which is below 1 where adapters are surer than they are right."
            ),
        ]
        parts += _held_out(data)
    else:
        parts.append(paragraph("ensemble.json holds no weights.", class_="note"))
    return section("Weights of the ensemble", *parts, *_boosting(data))


def _held_out(data: RunData) -> list[Html]:
    """What learned weights are worth on examples that they were not fitted on, and the router's figures."""
    found = data.ensemble.get("held_out") or {}
    kinds = ("learned", "own", "uniform")
    parts = []
    if found:
        rows: list[list[object]] = [
            [plain(task), compact(found[task]["examples"]), *(number(found[task][kind]) for kind in kinds)]
            for task in data.order
            if task in found
        ]
        means = [number(sum(each[kind] for each in found.values()) / len(found)) for kind in kinds]
        head = ["dataset", "examples", "learned weights", "own group only", "uniform weights"]
        parts += [
            element("h3", "Held-out validation loss"),
            table(head, rows, [f"mean of {len(found)}", "", *means]),
            paragraph("Learned weights are cross-fitted: an example is judged by weights that were fitted without it."),
        ]
    router = data.metrics.get("router")
    if isinstance(router, dict):
        rows = [
            [plain(task), *(measured("accuracy", router["tasks"][task][key]) for key in ("accuracy", "end_to_end"))]
            for task in data.order
        ]
        mean = [measured("accuracy", router["mean"][key]) for key in ("accuracy", "end_to_end")]
        about = (
            "The router sees the text without its template. End to end: the picked dataset's prompt and label words are used "
            "too, and an input that is sent to a dataset which asks something else counts as wrong."
        )
        parts += [
            element("h3", "Where an input's dataset is not known"),
            table(["dataset", "router's accuracy", "accuracy end to end"], rows, ["mean", *mean]),
            paragraph(about),
        ]
    return parts


def _boosting(data: RunData) -> list[Html]:
    """What each boosting step did to its group's losses."""
    steps = facts.boosting_steps(data)
    if not steps:
        return [paragraph("There were no boosting steps.")]
    head = ["booster", "group", "training loss", "→", "validation loss", "→", "step sizes"]
    rows: list[list[object]] = []
    for step in steps:
        losses = [number(value, 3) for value in (*step.training, *step.validation)]
        sizes = ", ".join(f"{plain(task)} {number(value, 2)}" for task, value in step.sizes.items())
        rows.append(
            [plain(step.adapter + ("" if step.kept else " (left out)")), plain(step.group), *losses, sizes or "–"]
        )
    stopped = (data.ensemble.get("boosting") or {}).get("stopped")
    text = (
        "A booster adds its step size times (its score − the score at the adapters' common start) to the scores of its group's "
        f"datasets; a step size of 0 leaves it out.{f' Boosting ended: {plain(stopped)}.' if stopped else ''}"
    )
    return [element("h3", "Boosting"), table(head, rows, text=2), paragraph(text)]


def _cost(data: RunData, figures: Figures) -> Html:
    reference = facts.flops_reference(data)
    rows: list[list[object]] = []
    for part in facts.flops_parts(data):
        share = number(part.flops / reference, 3) if reference else "–"
        rows.append([part.name, facts.operations(part.flops), share])
    parts: list[object] = []
    if rows:
        total = sum(part.flops for part in facts.flops_parts(data))
        rows.append(["ensemble, all parts", facts.operations(total), number(facts.flops_ratio(data), 3)])
        foot = ["one QLoRA on all", facts.operations(reference), "1.000"]
        parts.append(table(["FLOPs", "", "of one QLoRA on all"], rows, foot))
    else:
        parts.append(paragraph("metrics.json holds no FLOPs.", class_="note"))
    times, peaks = facts.figures(data, "seconds"), facts.figures(data, "peak_memory_bytes")
    stages = [*times, *(stage for stage in peaks if stage not in times)]
    if stages:
        head = ["stage", "time", "peak memory"]
        cells = [[plain(stage), facts.seconds(times.get(stage)), facts.size(peaks.get(stage))] for stage in stages]
        parts.append(table(head, cells))
    else:
        parts.append(paragraph("metrics.json holds neither seconds nor memory by stage.", class_="note"))
    return section("What it cost", figures["cost"], *parts)
