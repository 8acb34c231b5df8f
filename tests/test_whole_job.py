"""The whole job on a tiny random model, stage after stage, and the formats that other programs read."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from tiny import OPTIONS, write_job, write_task

from ray_ensemble import Job
from ray_ensemble.adapter_stages import ensemble
from ray_ensemble.cli import main
from ray_ensemble.config import load_config
from ray_ensemble.ensemble import Predictor
from ray_ensemble.estimator import validation_halves
from ray_ensemble.gradients import GradientStore
from ray_ensemble.merging import merge_ensembles
from ray_ensemble.run_folder import RunFolder
from ray_ensemble.stages import Stages

pytestmark = pytest.mark.ray


@pytest.fixture
def run(finished_run: Path) -> Path:
    return finished_run


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """A copy to spoil; a run folder does not mind being moved."""
    return Path(shutil.copytree(finished_run, tmp_path / "copy"))


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def test_formats(run):
    partition = json.loads((run / "partition.json").read_text())
    assert sorted(t for g in partition["groups"] for t in g) == ["contrary", "films", "options", "phones"]
    assert partition["m"] == len(partition["groups"])
    assert {"objective", "method", "seed"} <= partition.keys()
    affinity = json.loads((run / "affinity.json").read_text())
    assert np.array(affinity["values"]).shape == (4, 4)
    assert {"tasks", "subsets", "subset_size"} <= affinity.keys()
    ensemble = json.loads((run / "ensemble.json").read_text())
    assert ensemble["adapters"] == [f"group-{g}" for g in range(partition["m"])]
    for weights in ensemble["weights"].values():
        assert sum(weights) == pytest.approx(1)
        assert min(weights) >= 0
    assert ensemble["scales"].keys() == ensemble["weights"].keys()
    assert min(ensemble["scales"].values()) > 0
    metrics = json.loads((run / "metrics.json").read_text())
    for models in metrics["tasks"].values():
        assert list(models) == ["base", "qlora_all", "group", "ensemble", "merged"]
        for m in models.values():
            assert m["n"] == 10
            assert m["loss"] > 0
            assert 0 <= m["accuracy"] <= 1
    assert metrics["mean"].keys() == {"base", "qlora_all", "group", "ensemble", "merged"}
    ours = {"gradients", "search", "groups", "boosting", "ensemble", "merging"}
    assert metrics["flops"].keys() == ours | {"qlora_all", "ratio"}
    parts = [metrics["flops"][part] for part in ours]
    assert metrics["flops"]["ratio"] == pytest.approx(sum(parts) / metrics["flops"]["qlora_all"])
    assert {"gradients", "search", "train", "ensemble"} <= metrics["seconds"].keys() & metrics[
        "peak_memory_bytes"
    ].keys()


def test_budgets_are_equal(run):
    steps = json.loads((run / "manifests" / "train.json").read_text())["steps"]
    baseline = steps.pop("qlora_all")
    assert baseline == sum(steps.values())
    for name, count in steps.items():
        rows = [json.loads(line) for line in (run / "adapters" / name / "train.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(count))


def test_adapters_load_with_peft_as_they_are(run, tiny_model):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(5, 17)[None]
    for folder in [*(run / "adapters").iterdir(), run / "baselines" / "qlora_all", *(run / "merged").iterdir()]:
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        bare = base(input_ids=ids).logits
        assert (PeftModel.from_pretrained(base, folder)(input_ids=ids).logits - bare).abs().max() > 1e-3


def test_training_taught_something(run):
    mean = json.loads((run / "metrics.json").read_text())["mean"]
    assert mean["ensemble"]["loss"] < mean["base"]["loss"]


def test_report_is_one_file_with_the_results(run):
    html = (run / "report.html").read_text()
    assert "contrary" in html
    assert 'src="http' not in html
    assert list((run / "plots").glob("*.png"))


def test_features_are_the_same_for_one_and_two_actors(run, tiny_model, task_folder, tmp_path):
    job = Job.from_yaml(write_job(tmp_path, tiny_model, task_folder, gradients={"dim": 64, "replicas": 1}))
    job.through("gradients", tmp_path / "one")
    ours, theirs = run / "gradients", tmp_path / "one" / "gradients"
    files = sorted(p.relative_to(ours) for p in ours.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(theirs) for p in theirs.rglob("*") if p.is_file())
    assert len([f for f in files if f.suffix == ".npy"]) == 4 * (3 + 3)
    for file in files:
        assert (ours / file).read_bytes() == (theirs / file).read_bytes(), file


def test_the_store_reads_as_documented(run):
    store = GradientStore.open(run / "gradients")
    train, validation = store["options", "train"], store["options", "validation"]
    assert train.features.shape == (24, 64)
    assert train.margins.shape == train.labels.shape == (24,)
    assert validation.class_scores.shape == (8, 4)
    assert validation.class_features.shape == (8, 4, 64)
    assert np.isfinite(train.features).all()


def test_a_finished_run_does_nothing_again(run, tiny_model, task_folder, capsys):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    Job.from_yaml(run / "config.yaml").run(run)
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before


def test_damaged_gradients_are_named_and_only_they_are_recomputed(run_copy, capsys):
    run = run_copy
    victim = run / "gradients" / "films" / "train" / "features.npy"
    good = victim.read_bytes()
    others = {p: p.stat().st_mtime_ns for p in (run / "gradients" / "phones").rglob("*.npy")}
    spoiled = bytearray(good)
    spoiled[-5] ^= 1
    victim.write_bytes(bytes(spoiled))
    Job.from_yaml(run / "config.yaml").run(run)
    shown = capsys.readouterr().out
    assert str(victim) in shown
    assert victim.read_bytes() == good
    assert {p: p.stat().st_mtime_ns for p in others} == others


def test_search_leaves_its_plot_and_tells_what_it_found(run_copy, capsys):
    shutil.rmtree(run_copy / "plots")
    command = ["search", str(run_copy / "config.yaml"), "--output", str(run_copy), "--redo", "--set"]
    assert main([*command, "search.trials=3"]) == 0
    assert [path.name for path in (run_copy / "plots").iterdir()] == ["search.png"]
    shown = capsys.readouterr().out
    partition = json.loads((run_copy / "partition.json").read_text())
    for row in partition["by_m"]:
        assert f"{row['search_objective']:.4f}" in shown
        assert f"{row['objective']:.4f}" in shown
    assert f"*{partition['m']}" in shown


def test_redo_trains_nothing_that_is_known(run_copy):
    """After another search the groups that were trained before come from the cache, and only others are trained."""
    run = run_copy
    trained = {p: p.stat().st_mtime_ns for p in (run / "trained").glob("*/result.json")}
    before = json.loads((run / "partition.json").read_text())["groups"]
    job = Job.from_yaml(run / "config.yaml", ["search.trials=5"])
    job.run(run, redo=True)
    after = json.loads((run / "partition.json").read_text())["groups"]
    now = {p: p.stat().st_mtime_ns for p in (run / "trained").glob("*/result.json")}
    assert {p: now[p] for p in trained} == trained
    assert (len(now) == len(trained)) == (after == before)


def test_predict_agrees_with_the_evaluation(run, task_folder, capsys):
    rows = [json.loads(line) for line in (task_folder / "options" / "test.jsonl").read_text().splitlines()]
    assert main(["predict", str(run), "--task", "options", "--input", str(task_folder / "options" / "test.jsonl")]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    right = [prediction["label"] == OPTIONS[row["label"]] for prediction, row in zip(found, rows, strict=True)]
    loss = np.mean([-np.log(p["probabilities"][OPTIONS[row["label"]]]) for p, row in zip(found, rows, strict=True)])
    metric = json.loads((run / "metrics.json").read_text())["tasks"]["options"]["ensemble"]
    assert np.mean(right) == pytest.approx(metric["accuracy"])
    assert loss == pytest.approx(metric["loss"], rel=1e-3)


def test_merged_adapters_are_told_of_and_measured(run):
    ensemble, metrics = read(run, "ensemble"), read(run, "metrics")
    for task, told in ensemble["merged"].items():
        several = sum(weight > 0 for weight in ensemble["weights"][task])
        used = several if told["share"] else 1
        assert (told["rank"], told["norm_kept"]) == (4 * used, 1.0)
        assert told["vllm_max_lora_rank"] == {1: 8, 2: 8, 3: 16}[used]
        assert (told["divergence"] is None) == (several == 1)
        assert told["share"] == 1 or several > 1
        assert read(run, f"merged/{task}/adapter_config")["r"] == told["rank"]
        models = metrics["tasks"][task]
        for measure, found in metrics["paired"]["merged_vs_ensemble"]["tasks"][task].items():
            wanted = models["merged"][measure] - models["ensemble"][measure]
            assert found["difference"] == pytest.approx(wanted, abs=1e-12)
    assert "merged − ensemble: loss" in (run / "report.html").read_text()
    assert not (run / "merging").exists()


def test_the_scores_of_an_only_adapter_have_scales_too(run_copy):
    """With one group there is nothing to weigh, but how sure to be is still learned on held-out examples."""
    partition = read(run_copy, "partition")
    everything = [task for group in partition["groups"] for task in group]
    (run_copy / "partition.json").write_text(json.dumps({**partition, "groups": [everything], "m": 1}))
    with ExitStack() as stack:
        ensemble(Stages(RunFolder(run_copy, load_config(run_copy / "config.yaml")), stack))
    told = read(run_copy, "ensemble")
    assert told["weights"] == {task: [1.0] for task in everything}
    assert all(scale > 0 for scale in told["scales"].values())
    assert set(told["scales"].values()) != {1.0}
    assert told["held_out"].keys() == set(everything)


def test_merged_adapters_predict_as_nearly_like_the_ensemble_as_they_say(run_copy, task_folder):
    """Held-out prompts once more, by what predicts, under weights and scales that use several adapters."""
    shares = {"contrary": (0.6, 0.5), "films": (0.3, 3.0), "options": (0.5, 1.5), "phones": (0.8, 0.2)}
    ensemble = {
        "adapters": read(run_copy, "ensemble")["adapters"],
        "weights": {task: [w, 1 - w] for task, (w, _) in shares.items()},
        "scales": {task: scale for task, (_, scale) in shares.items()},
        "boosting": {},
    }
    with ExitStack() as stack:
        stages = Stages(RunFolder(run_copy, load_config(run_copy / "config.yaml")), stack)
        merged = merge_ensembles(stages, ensemble, scored=False)
    (run_copy / "ensemble.json").write_text(json.dumps({**ensemble, "merged": merged.told}))
    for task, told in merged.told.items():
        rows = [json.loads(line) for line in (task_folder / task / "validation.jsonl").read_text().splitlines()]
        requests = [(task, rows[i]) for i in validation_halves(len(rows))[1]]
        p, q = (
            np.array(
                [list(each["probabilities"].values()) for each in Predictor(run_copy, [task], as_one).predict(requests)]
            )
            for as_one in (False, True)
        )
        assert told["divergence"] > 0
        assert (p * np.log(p / q)).sum(axis=1).mean() == pytest.approx(told["divergence"], abs=1e-5)


@pytest.mark.slow
def test_a_rank_budget_of_merged_adapters_is_kept_and_measured(run_copy, capsys):
    """A rank below that of one adapter, so that all are cut; only the ensemble stage and what follows run again."""
    command = ["run", str(run_copy / "config.yaml"), "--output", str(run_copy), "--redo", "--set"]
    before = read(run_copy, "metrics")["tasks"]
    assert main([*command, "ensemble.merged_rank=1"]) == 0
    shown = capsys.readouterr().err
    assert "train: done before" in shown
    assert "vLLM serves them with --max-lora-rank 1" in shown
    ensemble, after = read(run_copy, "ensemble"), read(run_copy, "metrics")["tasks"]
    for task, told in ensemble["merged"].items():
        assert told["rank"] == told["vllm_max_lora_rank"] == read(run_copy, f"merged/{task}/adapter_config")["r"] == 1
        assert 0.1 < told["norm_kept"] < 1
        assert after[task]["merged"]["loss"] != before[task]["merged"]["loss"]
        assert after[task]["ensemble"] == before[task]["ensemble"]


@pytest.mark.slow
def test_whole_job_in_four_bits(ray_cluster, tiny_model, tmp_path):
    """NF4 on the CPU: gradients, training and scores all see the same quantised base."""
    write_task(tmp_path / "tasks" / "films", seed=1, train=16)
    write_task(tmp_path / "tasks" / "options", OPTIONS, seed=2, train=16)
    model = {"source": str(tiny_model), "quantization": "nf4"}
    path = write_job(
        tmp_path, tiny_model, tmp_path / "tasks", model=model, search={"groups": [1], "trials": 1},
        training={"epochs": 1, "min_steps": 4},
    )  # fmt: skip
    result = Job.from_yaml(path).run(tmp_path / "run")
    assert json.loads((result.folder / "plan.json").read_text())["model"]["quantization"] == "nf4"
    plain = Job.from_yaml(path, ["model.quantization=none"])
    plain.through("gradients", tmp_path / "plain")
    a = GradientStore.open(result.folder / "gradients")["options", "train"].features
    b = GradientStore.open(tmp_path / "plain" / "gradients")["options", "train"].features
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert 0.5 < cosine.mean() < 0.99999
    assert result.metrics["mean"]["ensemble"]["n"] == 20
