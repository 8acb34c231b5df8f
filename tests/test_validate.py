"""`validate`: sampled subsets really fine-tuned by Ray Train, and the estimate held against them."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from ray_ensemble import Job
from ray_ensemble.cli import main
from ray_ensemble.errors import InputError
from ray_ensemble.estimator import calibrate_regularization
from ray_ensemble.real_runs import calibration_truths
from ray_ensemble.run_folder import RunFolder
from ray_ensemble.stages import Stages

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def validated(finished_run: Path, whole_job: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("validated") / "run"
    shutil.copytree(finished_run, folder)
    (folder / "lease.json").unlink(missing_ok=True)
    Job.from_yaml(whole_job).validate(folder, subsets=2, repeats=1)
    return folder


@pytest.mark.slow
def test_truth_is_what_the_fine_tuned_adapters_reach(validated: Path, whole_job: Path):
    from ray_ensemble.models import LabelTree, attach_adapters, label_scores, load_base, load_tokenizer, make_batch
    from ray_ensemble.stages import encode_all
    from ray_ensemble.tasks import load_tasks

    found = json.loads((validated / "validation.json").read_text())
    assert found["subsets"] == 2
    assert [len(row["true"]) for row in found["table"]] == [2, 2, 2, 1, 1, 1]
    job = Job.from_yaml(whole_job).config
    model = Path(job.model.source)
    tasks = {t.name: t for t in encode_all(load_tasks(job.tasks, job.limits, Path()), load_tokenizer(model), job)}
    row = found["table"][0]
    records = {path.parent: json.loads(path.read_text()) for path in (validated / "trained").glob("*/result.json")}
    (adapter,) = [
        path for path, record in records.items() if record["members"] == row["subset"] and record["seed"] == 0
    ]
    adapted = attach_adapters(load_base(model, "none", torch.device("cpu")), {"default": adapter})
    task = tasks[row["task"]]
    tree = LabelTree.of(task.label_ids)
    losses = []
    for example in task["validation"]:
        batch = make_batch([example], [tree], len(task.labels), 0, torch.device("cpu"))
        with torch.inference_mode():
            scores = label_scores(adapted, batch)
        losses.append(float(torch.nn.functional.cross_entropy(scores, batch.labels)))
    assert row["true"][0]["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    errors = [abs(r["estimated"]["loss"] - r["true"][0]["loss"]) / r["true"][0]["loss"] for r in found["table"]]
    assert found["loss_error"] == pytest.approx(np.mean(errors))


@pytest.mark.slow
def test_again_trains_nothing_and_says_the_same(validated: Path, whole_job: Path, capsys):
    before = (validated / "validation.json").read_bytes()
    stamps = {path: path.stat().st_mtime_ns for path in (validated / "trained").rglob("*")}
    assert main(["validate", str(whole_job), "-o", str(validated), "--subsets", "2", "--repeats", "1"]) == 0
    assert (validated / "validation.json").read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in (validated / "trained").rglob("*")} == stamps
    told = " ".join(capsys.readouterr().out.split())
    assert "2 really fine-tuned subsets, 6 (subset, dataset) points" in told
    assert "Spearman" in told


@pytest.mark.parametrize(("subsets", "repeats", "said"), [(0, 0, "at least one"), (2, 3, "0 to 2"), (99, 0, "only 4")])
def test_counts_that_make_no_sense_are_refused(finished_run: Path, whole_job: Path, subsets, repeats, said):
    with pytest.raises(InputError, match=said):
        Job.from_yaml(whole_job).validate(finished_run, subsets=subsets, repeats=repeats)


@pytest.mark.slow
def test_calibration_trains_other_subsets_and_takes_their_regularization(validated: Path, whole_job: Path, tmp_path):
    """λ is the one nearest to what the calibration's run reached, and that run has no part in what `validate` tells."""
    folder = tmp_path / "run"
    shutil.copytree(validated, folder)
    (folder / "lease.json").unlink(missing_ok=True)
    job = Job.from_yaml(whole_job, ["estimator.calibrate=1"])
    found = job.validate(folder, subsets=3, repeats=0, redo=True)
    told = {tuple(row["subset"]) for row in found["table"]}
    with ExitStack() as stack:
        stages = Stages(RunFolder(folder, job.config), stack)
        features = stages.features()
        names = [task.name for task in features]
        (truth,), tokens = calibration_truths(stages, features)
    assert tuple(names[i] for i in truth.members) not in told
    assert len(told) == 3
    assert tokens > 0
    assert found["regularization"] == calibrate_regularization(features, job.config.training, [truth]).value
    with pytest.raises(InputError, match="only 3"):
        job.validate(folder, subsets=4, repeats=0)
