"""Mixed requests on one base give what each adapter gives alone, one row at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from run_by_hand import BOOSTING, CPU, SCALES, write_run
from scipy.special import softmax

from ray_ensemble.ensemble import Predictor, booster_scores, boosters_of, combine
from ray_ensemble.ensemble.scoring import ScoreRequest, ScoringReplica
from ray_ensemble.errors import InputError
from ray_ensemble.gradients import ReplicaSpec
from ray_ensemble.models import MixedAdapters, load_base, load_tokenizer
from ray_ensemble.serving.requests import tasks_of
from ray_ensemble.tasks import EncodedTask, Example, Task, encode_task


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


@pytest.fixture(scope="module")
def plain_run(tiny_model, task_folder, tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("plain") / "run", tiny_model, task_folder)


def encoded_row(run: Path, model: Path, name: str, row: dict) -> EncodedTask:
    entry = next(e for e in json.loads((run / "tasks.json").read_text())["tasks"] if e["name"] == name)
    examples = {"train": (), "validation": (), "test": (Example({"text": row["text"]}, 0),)}
    return encode_task(Task(name, entry["prompt"], tuple(entry["labels"]), examples), load_tokenizer(model), 64)


def sequential(run: Path, model: Path, requests) -> list[dict[str, float]]:
    """Probabilities by PEFT's own adapters, one after the other, a row a batch."""
    quantization = json.loads((run / "plan.json").read_text())["model"]["quantization"]
    ensemble = json.loads((run / "ensemble.json").read_text())
    replica = ScoringReplica(ReplicaSpec(str(model), quantization, str(run / "init"), 0), 1, 1)
    found = []
    for name, row in requests:
        encoded = encoded_row(run, model, name, row)

        def scores(folder: Path | None, encoded: EncodedTask = encoded) -> np.ndarray:
            return replica.score(ScoreRequest(folder, encoded, encoded["test"]))["scores"]

        start = run / "start" if (run / "start").exists() else None
        folders = [start if member == "start" else run / "adapters" / member for member in ensemble["adapters"]]
        total = SCALES[name] * combine(
            np.stack([scores(each) for each in folders]), np.array(ensemble["weights"][name])
        )
        boosters, step = boosters_of(BOOSTING, name)
        if boosters:
            stack = np.stack([scores(run / "boosters" / booster) for booster in boosters])
            total += step * booster_scores(stack, scores(start))
        found.append(dict(zip(encoded.labels, softmax(total[0]), strict=True)))
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


def test_only_what_has_weight_is_loaded(tiny_model, task_folder, requests, tmp_path):
    run = write_run(tmp_path / "run", tiny_model, task_folder)
    rows = [request for request in requests if request[0] == "phones"]
    wanted = Predictor(run).predict(rows)
    for name in ("group-0", "group-1", "group-3"):
        shutil.rmtree(run / "adapters" / name)
    shutil.rmtree(run / "boosters")
    predictor = Predictor(run, ["phones"])
    assert list(predictor.tasks) == ["phones"]
    assert (predictor.tasks["phones"].labels, predictor.tasks["phones"].fields) == (("no", "yes"), ("text",))
    found = predictor.predict(rows)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-5)
    assert predictor.predict([]) == []
    with pytest.raises(InputError, match=r"group-0/adapter_config\.json: this adapter configuration is missing"):
        Predictor(run)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            ("film", {"text": "good"}),
            r"request 2: no task 'film'.*'films'.*\(tasks: contrary, films, options, phones\)",
        ),
        (("films", {"txt": "good"}), r"request 2: no field 'text' \(the prompt names text\)"),
        (("films", {"text": ["good"]}), r'request 2: field .text. is neither text nor a number, but \["good"\]'),
        (("films", {"text": None}), "request 2: field .text. is neither text nor a number, but null"),
    ],
)
def test_a_wrong_request_is_named_by_its_number(plain_run, spoil, message):
    with pytest.raises(InputError, match=message):
        Predictor(plain_run).predict([("films", {"text": "good"}), spoil, ("films", {"text": "bad"})])


def test_a_prompt_that_does_not_fit_is_named_by_its_number(tiny_model, task_folder, tmp_path):
    """A template of nothing but a field renders to nothing."""
    run = write_run(tmp_path / "run", tiny_model, task_folder)
    described = json.loads((run / "tasks.json").read_text())
    described["tasks"][1]["prompt"] = "{text}"
    (run / "tasks.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match=r"request 3: task 'films': the prompt of .* has no tokens"):
        Predictor(run).predict([("films", {"text": "good"}), ("phones", {"text": ""}), ("films", {"text": ""})])


def test_what_the_run_lacks_is_told(plain_run, tmp_path):
    with pytest.raises(InputError, match="no task 'nothing'"):
        Predictor(plain_run, ["films", "nothing"])
    copy = Path(shutil.copytree(plain_run, tmp_path / "copy"))
    (copy / "ensemble.json").unlink()
    with pytest.raises(InputError, match=r"ensemble.json: this ensemble is missing"):
        Predictor(copy)


def test_a_run_that_does_its_ensemble_anew_is_refused(plain_run, tmp_path):
    """The weights that are still there belong to the adapters of before; the stage's manifest goes first."""
    copy = Path(shutil.copytree(plain_run, tmp_path / "copy"))
    (copy / "manifests" / "ensemble.json").unlink()
    for ask in (Predictor, tasks_of):
        with pytest.raises(InputError, match=r"the ensemble stage is not whole .* or does a part of it anew"):
            ask(copy)


def test_adapters_of_another_base_are_refused(tiny_model, plain_run):
    model = load_base(tiny_model, "none", CPU)
    del model.model.layers[1]
    with pytest.raises(InputError, match=r"of another base \(this one has no module model.layers.1"):
        MixedAdapters(model, {"a": plain_run / "adapters" / "group-0"})


def test_merged_predictions_are_those_of_the_merged_adapter_alone(plain_run, tiny_model, requests):
    """Merged adapters differ in rank; each of a mix is what PEFT makes of it."""
    found = Predictor(plain_run, merged=True).predict(requests)
    replica = ScoringReplica(ReplicaSpec(str(tiny_model), "none", str(plain_run / "init"), 0), 1, 1)
    for (name, row), ours in zip(requests, found, strict=True):
        encoded = encoded_row(plain_run, tiny_model, name, row)
        scores = replica.score(ScoreRequest(plain_run / "merged" / name, encoded, encoded["test"]))["scores"]
        theirs = dict(zip(encoded.labels, softmax(SCALES[name] * scores[0].astype(np.float64)), strict=True))
        assert ours["probabilities"] == pytest.approx(theirs, abs=1e-5)


def test_rows_of_one_adapter_must_stand_together(tiny_model, plain_run):
    folders = {name: plain_run / "adapters" / name for name in ("group-0", "group-1")}
    adapters = MixedAdapters(load_base(tiny_model, "none", CPU), folders)
    names = ["group-1", None, "group-0", "group-1"]
    ordered = [names[i] for i in adapters.order(names)]
    assert sorted(map(str, ordered)) == sorted(map(str, names))
    with pytest.raises(ValueError, match="stand together"), adapters.rows(names):
        pass
    with adapters.rows(ordered):
        pass
