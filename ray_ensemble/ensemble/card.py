"""The model card of an exported run: use, data, partition, figures, settings and licences."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ray_ensemble.ensemble.weights import scale_of
from ray_ensemble.storage import is_url, without_settings
from ray_ensemble.tasks import prompt_fields
from ray_ensemble.version import __version__

if TYPE_CHECKING:
    from ray_ensemble.ensemble.export import FinishedRun

_SETTINGS = ("adapter", "limits", "gradients", "estimator", "search", "training", "boosting", "ensemble")
_MODELS = {
    "base": "base",
    "qlora_all": "one QLoRA on all",
    "group": "own group's adapter",
    "ensemble": "ensemble",
    "merged": "ensemble merged",
}


def model_card(run: FinishedRun) -> str:
    """The card (Markdown with the hub's YAML front matter) of a run. It names no licence: that is for who publishes it."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="peft",
        base_model=run.hub_base,  # the hub takes nothing but ids of its own here
        datasets=sorted({t.source.removeprefix("hf:") for t in run.config.tasks if _on_hub(t.source)}) or None,
        pipeline_tag="text-generation",
        tags=["lora", "peft", "ray-ensemble", "text-classification"],
    )
    parts = [_introduction(run), _use(run), _data(run), _partition(run), _figures(run), _training(run), _licences(run)]
    return f"---\n{data.to_yaml().strip()}\n---\n\n" + "\n\n".join(parts) + "\n"


def public_source(source: str) -> str:
    """A source without what is not for the public: of a local path or a URL the last part, all others as they are."""
    bare = source.removeprefix("hf:")
    if is_url(bare):
        return without_settings(bare).rstrip("/").rpartition("/")[2]
    return Path(bare).name if Path(bare).is_absolute() else bare


def _introduction(run: FinishedRun) -> str:
    boosters = run.ensemble["boosting"]["adapters"]
    rows = [
        ["`merged/<dataset>/`", "one PEFT adapter for each dataset: its ensemble in one pass"],
        ["`adapters/<group>/`", "one PEFT adapter for each group of datasets"],
        ["`ensemble.json`", "each dataset's weights over the adapters of groups, and the scale of its scores"],
        ["`tasks.json`", "each dataset's prompt and label words"],
        ["`predict.py`", "labels text by a dataset's ensemble"],
        ["`serve_vllm.sh`", "serves every adapter with vLLM"],
    ]
    if boosters:
        rows.insert(2, ["`boosters/<name>/`", "PEFT adapters that boosting added"])
    if run.starts_warm:
        rows.insert(3, ["`start/`", "the PEFT adapter that all others started from, trained on all datasets"])
    model = run.plan["model"]
    return (
        f"# LoRA adapters for {len(run.tasks)} datasets on {run.base}\n\n"
        "The datasets were put into groups by first-order estimates of which of them help each other, and an adapter was trained "
        "for each group. A dataset's answer is the label word of highest score. Its ensemble weighs the scores of several "
        f"adapters; its merged adapter approximates that in one pass. Made with ray-ensemble {__version__}, after "
        "[Li et al., ACL 2025](https://arxiv.org/abs/2505.21930).\n\n"
        f"Base: `{run.base}`, quantization `{model['quantization']}`; SHA-256 over its config and weights `{model['hash']}`.\n\n"
        + _table(["path", "what it is"], rows)
    )


def _use(run: FinishedRun) -> str:
    task = run.tasks[0]
    base = run.hub_base or "path/to/the/base"
    text = "## Use\n\n"
    if run.hub_base is None:
        text += (
            f"The base is `{run.base}`; in its place stands below a folder that holds it as transformers loads it.\n"
        )
        if run.base.startswith("pypi:"):
            text += f'`ray_ensemble.models.materialise("{run.base}")` makes one and returns its path.\n'
        text += "\n"
    fields = ", ".join(f'"{field}": "…"' for field in prompt_fields(task["prompt"]))
    return (
        f"{text}"
        "```python\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base}")\n'
        f'model = PeftModel.from_pretrained(base, "merged/{task["name"]}")\n'
        "```\n\n"
        "Label words are scored by the sum of the log-probabilities of their tokens after the prompt; times the dataset's scale "
        "(below), their softmax is the probability of each. `predict.py` does so:\n\n"
        "```sh\n"
        f"python predict.py {task['name']} '{{{fields}}}' --base {base}\n"
        f"{'BASE=' + base + ' ' if run.hub_base is None else ''}sh serve_vllm.sh\n"
        "```\n\n"
        f"Prompts were cut to {run.config.limits.max_tokens} tokens in training."
    )


def _data(run: FinishedRun) -> str:
    rows = [
        [
            t["name"],
            "`" + t["prompt"].replace("`", "'") + "`",
            ", ".join(t["labels"]),
            t["train"],
            t["validation"],
            t["test"],
            f"`{t['data_hash'][:16]}`",
        ]
        for t in run.tasks
    ]
    table = _table(["dataset", "prompt", "labels", "train", "validation", "test", "SHA-256 of the data"], rows)
    sources = []
    for task in run.config.tasks:
        details = [f"`{part}`" for part in (task.name, task.config, task.part) if part]
        sources.append(f"- `{public_source(task.source)}`{' (' + ', '.join(details) + ')' if details else ''}")
    return (
        f"## Data\n\nExamples by split, and the beginning of a hash of what the model was shown.\n\n{table}\n\nSources:\n\n"
        + "\n".join(sources)
    )


def _partition(run: FinishedRun) -> str:
    names = run.ensemble["adapters"]
    groups = zip([name for name in names if name != "start"], run.partition["groups"], strict=True)
    rows = [[f"`{name}`", ", ".join(group), run.steps.get(name, "")] for name, group in groups]
    if "start" in names:
        rows.append(["`start`", "all", run.config.gradients.meta_steps])
    weights = [
        [task, *(f"{w:.3f}" if w else "0" for w in found), f"{scale_of(run.ensemble, task):.3f}"]
        for task, found in run.ensemble["weights"].items()
    ]
    text = (
        f"## Partition\n\nFound by `{run.partition['method']}` with seed {run.partition['seed']}; estimated objective "
        f"{run.partition['objective']:.4f}.\n\n{_table(['adapter', 'datasets', 'steps'], rows)}\n\n"
        "Weights of each dataset over the adapters, and the scale that the weighted scores are multiplied by before the softmax "
        f"over its label words:\n\n{_table(['dataset', *names, 'scale'], weights)}"
    )
    steps = run.ensemble["boosting"].get("step_sizes", {})
    boosters = run.ensemble["boosting"].get("boosters", {})
    rows = [[task, ", ".join(boosters[task]), f"{steps[task]:.3f}"] for task in boosters]
    return text + (f"\n\nBoosting:\n\n{_table(['dataset', 'boosters', 'step size'], rows)}" if rows else "")


def _figures(run: FinishedRun) -> str:
    if run.metrics is None:
        return "## Figures\n\nThe run was not evaluated on its test splits."
    measured = [name for name in _MODELS if name in run.metrics["mean"]]
    rows = [
        [task, found["ensemble"]["n"], *(_metric(found[name]) for name in measured)]
        for task, found in run.metrics["tasks"].items()
    ]
    mean = run.metrics["mean"]
    rows.append(["**mean**", mean["ensemble"]["n"], *(f"**{_metric(mean[name])}**" for name in measured)])
    return (
        "## Figures\n\nAccuracy and loss on the test splits of this run; loss in nats an example, of the right label's "
        "share among the label words.\n\n"
        + _table(["dataset", "examples", *(_MODELS[name] for name in measured)], rows)
        + "\n\nFloating-point operations of gradients, search, groups, boosting, weights and merging over those of one QLoRA on "
        "all data with as many steps: "
        f"{run.metrics['flops']['ratio']:.2f}."
    )


def _training(run: FinishedRun) -> str:
    settings = run.config.model_dump(mode="json", include=set(_SETTINGS))
    text = yaml.safe_dump({key: settings[key] for key in _SETTINGS}, sort_keys=False, allow_unicode=True)
    return f"## Training\n\n```yaml\n{text}```"


def _licences(run: FinishedRun) -> str:
    return (
        "## Licences\n\n"
        f"No licence is stated here. Adapters are made from the base (`{run.base}`) and from the data above: the terms of both "
        "apply to them, and whoever publishes them has to check both and then set `license` at the top of this card. The code of "
        "`predict.py` is under Apache-2.0, as ray-ensemble is."
    )


def _metric(found: dict[str, Any]) -> str:
    return f"{100 * found['accuracy']:.1f}% / {found['loss']:.3f}"


def _on_hub(source: str) -> bool:
    return source.startswith("hf:") and not source.startswith("hf:/")


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: Any) -> str:
    """Text that cannot end a cell of a table."""
    return str(value).replace("\n", "⏎").replace("|", "\\|")
