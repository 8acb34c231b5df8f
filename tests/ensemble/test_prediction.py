"""Mixed requests on one base give what each adapter gives alone, one row at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from run_by_hand import BOOSTING, CPU, WEIGHTS, write_run
from scipy.special import log_softmax, softmax

from ray_ensemble.ensemble import Predictor, booster_scores, boosters_of, combine
from ray_ensemble.ensemble.scoring import ScoreRequest, ScoringReplica
from ray_ensemble.errors import InputError
from ray_ensemble.gradients import ReplicaSpec
from ray_ensemble.tasks import Example, Task, encode_task
from ray_ensemble.models import load_tokenizer


@pytest.fixture(scope="module", params=["fresh", "warm", "nf4"])
def run(request, tiny_model, task_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prediction") / "run"
    quantization = "nf4" if request.param == "nf4" else "none"
    return write_run(folder, tiny_model, task_folder, quantization=quantization, warm=request.param == "warm")


@pytest.fixture(scope="module")
def requests(task_folder) -> list[tuple[str, dict]]:
    """Test rows of all tasks, shuffled."""
    rows = [
        (path.name, json.loads(line))
        for path in sorted(task_folder.iterdir())
        for line in (path / "test.jsonl").read_text().splitlines()[:5]
    ]
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


def sequential(run: Path, model: Path, requests) -> list[dict[str, float]]:
    """Probabilities by PEFT's own adapters, one after the other, a row a batch."""
    described = {entry["name"]: entry for entry in json.loads((run / "tasks.json").read_text())["tasks"]}
    plan = json.loads((run / "plan.json").read_text())["model"]
    replica = ScoringReplica(ReplicaSpec(str(model), plan["quantization"], str(run / "init"), 0), 1, 1)
    tokenizer, found = load_tokenizer(model), []
    for name, row in requests:
        entry = described[name]
        examples = {"train": (), "validation": (), "test": (Example({"text": row["text"]}, 0),)}
        encoded = encode_task(Task(name, entry["prompt"], tuple(entry["labels"]), examples), tokenizer, 64)

        def scores(folder: Path | None, encoded=encoded) -> np.ndarray:
            return replica.score(ScoreRequest(folder, encoded, encoded["test"]))["scores"]

        total = combine(np.stack([scores(run / "adapters" / f"group-{g}") for g in range(4)]), np.array(WEIGHTS[name]))
        boosters, step = boosters_of(BOOSTING, name)
        if boosters:
            stack = np.stack([scores(run / "boosters" / booster) for booster in boosters])
            total += step * booster_scores(stack, scores(run / "start" if (run / "start").exists() else None))
        found.append(dict(zip(entry["labels"], softmax(total[0]), strict=True)))
    return found


def test_a_mix_of_tasks_is_what_the_adapters_give_one_by_one(run, tiny_model, requests):
    predictor = Predictor(run)
    found, wanted = predictor.predict(requests), sequential(run, tiny_model, requests)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours["probabilities"] == pytest.approx(theirs, abs=1e-5)
        assert ours["label"] == max(theirs, key=theirs.__getitem__)
    assert len({round(max(each["probabilities"].values()), 4) for each in found}) > 10, "the rows differ"
    for request, together in list(zip(requests, found, strict=True))[:6]:
        (alone,) = predictor.predict([request])
        assert alone["probabilities"] == pytest.approx(together["probabilities"], abs=1e-5)


def test_only_what_has_weight_is_loaded_and_run(run, requests):
    for path in ("adapters/group-0", "adapters/group-1", "adapters/group-3"):
        assert (run / path).is_dir()
    copy = Path(shutil.copytree(run, run.parent / "copy"))
    for name in ("group-0", "group-1", "group-3"):
        shutil.rmtree(copy / "adapters" / name)
    predictor = Predictor(copy, ["phones"])
    assert list(predictor.tasks) == ["phones"]
    assert predictor.tasks["phones"].labels == ("no", "yes")
    assert predictor.tasks["phones"].fields == ("text",)
    rows = [request for request in requests if request[0] == "phones"]
    assert predictor.predict(rows) == Predictor(run, ["phones"]).predict(rows)
    shutil.rmtree(copy)
