"""Weights of unseen datasets and routing in a whole run, on top of one that was finished without them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import write_task

from ray_ensemble import Job
from ray_ensemble.cli import main
from ray_ensemble.ensemble.router import Router

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CHANGES = ["ensemble.router=true", "ensemble.baselines=true"]


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def routed(finished_run, tmp_path_factory) -> Path:
    folder = Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("routed") / "run"))
    Job.from_yaml(folder / "config.yaml", CHANGES).run(folder, redo=True)
    return folder


def test_baselines_and_router_stand_beside_the_ensemble_and_change_nothing_in_it(routed, finished_run):
    ours, theirs = read(routed, "metrics"), read(finished_run, "metrics")
    assert "router" not in theirs
    for task, models in theirs["tasks"].items():
        assert "routed" not in models
        assert {name: ours["tasks"][task][name] for name in models} == models
        assert ours["tasks"][task].keys() - models.keys() == {"uniform", "routed"}
    assert {"routed_vs_ensemble", "ensemble_vs_uniform", "ensemble_vs_group"} <= ours["paired"].keys()
    router = ours["router"]
    for found in router["tasks"].values():
        assert 0 <= found["end_to_end"] <= 1
        assert 0 <= found["accuracy"] <= 1
    ensemble = read(routed, "ensemble")
    assert ensemble["held_out"].keys() == ensemble["weights"].keys()
    assert {"scale", "strength", "tried"} == ensemble["shrinkage"].keys()
    loaded = Router.load(routed / "router")
    assert list(loaded.tasks) == list(ensemble["weights"])
    html = (routed / "report.html").read_text()
    assert "dataset is not known" in html
    assert "Held-out validation loss" in html
    assert "dataset is not known" not in (finished_run / "report.html").read_text()


def test_a_router_that_is_always_right_gives_the_ensemble(routed):
    """The routed figure is that of the ensemble where the router is replaced by the truth."""
    from contextlib import ExitStack

    from ray_ensemble import routing
    from ray_ensemble.config import load_config
    from ray_ensemble.ensemble import ScoreRequest, add_up, coefficients, score_all
    from ray_ensemble.run_folder import RunFolder
    from ray_ensemble.stages import Stages

    with ExitStack() as stack:
        stages = Stages(RunFolder(routed, load_config(routed / "config.yaml")), stack)
        parts = {task.name: coefficients(read(routed, "ensemble"), task.name) for task in stages.encoded}
        found = routing.route(stages, parts)
        names = list(parts)
        truth = {task: np.tile([parts[task].get(name, 0.0) for name in found.columns], (10, 1)) for task in names}
        right = routing.Routed(
            stages, found.router, found.columns, {t: np.full(10, i) for i, t in enumerate(names)}, truth
        )
        requests = {
            (task, name): ScoreRequest(stages.adapter_folder(name), stages.task(task), stages.task(task)["test"])
            for task, name in right.needed
        }
        run = (stages.spec, stages.config.gradients, stages.base_hashes, routed, "scores")
        scores = dict(zip(requests, score_all(list(requests.values()), *run).scores, strict=True))
        for task in names:
            mine = {name: scores[task, name] for of, name in requests if of == task}
            np.testing.assert_allclose(right.scores(task, scores), add_up(mine, parts[task]), atol=1e-9)
        labels = {task: np.array([e.label for e in stages.task(task)["test"]]) for task in names}
        outputs = {task: {"routed": right.scores(task, scores)} for task in names}
        figures = right.figures(outputs, labels)
    assert figures["mean"]["accuracy"] == 1
    metrics = read(routed, "metrics")["tasks"]
    for task in names:
        assert figures["tasks"][task]["end_to_end"] == pytest.approx(metrics[task]["ensemble"]["accuracy"])


def test_weights_of_an_unseen_dataset(routed, tmp_path, capsys):
    write_task(tmp_path / "books", seed=9)
    command = ["weights", str(routed), "--task-folder", str(tmp_path / "books")]
    assert main(command) == 0
    shown = capsys.readouterr().out
    found = read(routed, "unseen/books")
    assert found["method"] == "examples"
    assert (found["examples"], found["labelled"]) == (32, 32)
    assert found["labels"] == ["no", "yes"]
    assert found["prompt"] == "Review: {text}\nAnswer:"
    assert found["adapters"] == read(routed, "ensemble")["adapters"]
    assert sum(found["weights"]) == pytest.approx(1)
    assert min(found["weights"]) >= 0
    assert found["scale"] > 0
    assert f"{found['held_out']['learned']:.3f}" in shown
    assert "Weights for books from 32 labelled examples" in shown
    assert main([*command, "--examples", "5"]) == 0
    assert "Weights for books from 5 of 32 labelled examples" in capsys.readouterr().out
    assert (read(routed, "unseen/books")["examples"], read(routed, "unseen/books")["labelled"]) == (5, 32)
    # Without labels: as many as there are, said so or not.
    assert main([*command, "--examples", "0"]) == 0
    bare = read(routed, "unseen/books")
    assert bare["method"] == "similarity"
    assert sum(bare["weights"]) == pytest.approx(1)
    scales = read(routed, "ensemble")["scales"].values()
    assert min(scales) <= bare["scale"] <= max(scales)
    assert sum(each["share"] for each in bare["datasets"].values()) == pytest.approx(1)
    for split in ("train", "validation"):
        file = tmp_path / "books" / f"{split}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows))
    assert main(command) == 0
    np.testing.assert_allclose(read(routed, "unseen/books")["weights"], bare["weights"])


def test_a_dataset_of_the_run_and_a_folder_that_is_none_are_refused(routed, task_folder, tmp_path, capsys):
    for folder, words in (
        (task_folder / "films", "'films' is a dataset of this run"),
        (tmp_path / "nowhere", "no such folder"),
        (task_folder, "task.json"),
    ):
        assert main(["weights", str(routed), "--task-folder", str(folder)]) == 2
        assert words in capsys.readouterr().err
    assert main(["weights", str(tmp_path), "--task-folder", str(task_folder / "films")]) == 2
    assert "no run folder is there" in capsys.readouterr().err
    assert main(["weights", str(routed), "--task-folder", str(task_folder / "films"), "--examples", "-1"]) == 2
    assert "--examples -1" in capsys.readouterr().err
