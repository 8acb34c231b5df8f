"""Figures for Prometheus: told once, never in the way of a run; the Grafana panels ask for what a real exporter has."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from ray import cloudpickle

from ray_ensemble import Job, metrics
from ray_ensemble.config import GradientsConfig
from ray_ensemble.metrics import FAILED, FIGURES, RUNNING, WHOLE, exported_names, run_figures
from ray_ensemble.pool import PlainActors, PoolSize, map_units
from ray_ensemble.progress import Bar
from ray_ensemble.run_folder import STAGES

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import a test module
CLUSTER = Path(__file__).parents[2] / "cluster"
BOARD = json.loads((CLUSTER / "grafana" / "ray_ensemble.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
GPU = {"ray_node_gpus_utilization", "ray_node_gram_used", "ray_node_gram_available"}  # exported where there are GPUs

Told = list[tuple[str, dict[str, str], float]]


@pytest.fixture
def told(monkeypatch) -> Told:
    """What would go to Ray if it were up."""
    seen: Told = []
    monkeypatch.setattr(metrics, "_ray_is_up", lambda: True)
    monkeypatch.setattr(metrics, "_record", lambda name, labels, value: seen.append((name, dict(labels), value)))
    return seen


def last(told: Told) -> dict[tuple[str, ...], float]:
    return {(name, *labels.values()): value for name, labels, value in told}


# What is told -----------------------------------------------------------------------------------------------------------


def test_without_ray_nothing_is_imported_and_nothing_told():
    code = (
        "import sys\n"
        "from ray_ensemble.metrics import RUNNING, run_figures\n"
        "from ray_ensemble.progress import Bar\n"
        "with run_figures('first') as figures:\n"
        "    figures.stage('gradients', RUNNING)\n"
        "    with Bar('gradients', 3, 'examples') as bar:\n"
        "        bar.advance(3)\n"
        "    figures.count('ensemble_actors_lost')\n"
        "assert 'ray' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_was_told_before_ray_is_told_when_it_is_up(told, monkeypatch):
    monkeypatch.setattr(metrics, "_ray_is_up", lambda: False)
    with run_figures("first") as figures:
        figures.stage("plan", RUNNING)
        figures.stage("plan", WHOLE, 1.5)
        assert told == []
        monkeypatch.setattr(metrics, "_ray_is_up", lambda: True)
        figures.stage("gradients", RUNNING)
    assert last(told) == {
        ("ensemble_stage", "first", "plan"): WHOLE,
        ("ensemble_stage_seconds", "first", "plan"): 1.5,
        ("ensemble_stage", "first", "gradients"): RUNNING,
    }


def test_a_bar_tells_what_it_shows_and_only_inside_a_run(told):
    with Bar("outside", 3, "rows") as bar:
        bar.advance()
    assert told == []
    with run_figures("first") as figures:
        figures.stage("gradients", RUNNING)
        with Bar("gradients", 10, "examples", done=4) as bar:
            bar.advance(3)
            found = last(told)
            assert found["ensemble_done", "first", "gradients", "examples"] == 7
            assert found["ensemble_total", "first", "gradients", "examples"] == 10
            rate = found["ensemble_per_second", "first", "gradients", "examples"]
            # Three of the seven are this run's; they took as long as the other three will.
            assert found["ensemble_seconds_left", "first", "gradients", "examples"] == pytest.approx(3 / rate)
            bar.reach(9, 12)
            assert last(told)["ensemble_total", "first", "gradients", "examples"] == 12
        assert last(told)["ensemble_seconds_left", "first", "gradients", "examples"] == 0
    assert {name for name, *_ in told} <= set(FIGURES)


def test_a_figure_that_ray_refuses_is_told_once_and_stops_nobody(told, monkeypatch, capsys):
    def refuse(*_: Any) -> None:
        raise ValueError("no such label")

    monkeypatch.setattr(metrics, "_record", refuse)
    with run_figures("first") as figures, Bar("work", 5, "examples") as bar:
        for _ in range(5):
            bar.advance()
        figures.count("ensemble_actors_lost")
    assert capsys.readouterr().err.count("no more figures for Prometheus: ValueError: no such label") == 1


def test_stages_say_how_they_stand(told, tmp_path, whole_job, monkeypatch):
    Job.from_yaml(whole_job).tasks(tmp_path / "first")
    found = last(told)
    assert [found["ensemble_stage", "first", stage] for stage in ("plan", "tasks")] == [WHOLE, WHOLE]
    assert found["ensemble_stage_seconds", "first", "plan"] > 0
    told.clear()
    Job.from_yaml(whole_job).tasks(tmp_path / "first")
    assert last(told) == {("ensemble_stage", "first", "plan"): WHOLE, ("ensemble_stage", "first", "tasks"): WHOLE}
    monkeypatch.setattr("ray_ensemble.stages.Stages.tasks", lambda self: 1 / 0)
    (tmp_path / "first" / "tasks.json").unlink()
    with pytest.raises(ZeroDivisionError):
        Job.from_yaml(whole_job).tasks(tmp_path / "first")
    assert last(told)["ensemble_stage", "first", "tasks"] == FAILED


def test_gauges_are_told_again_until_the_run_ends_and_counters_are_not(told, monkeypatch):
    monkeypatch.setattr(metrics, "TOLD_AGAIN_S", 0.01)
    with run_figures("first") as figures:
        figures.stage("search", RUNNING)
        figures.count("ensemble_actors_lost")
        first = len(told)
        while len(told) < first + 5:
            time.sleep(0.01)
    after = len(told)
    assert set(map(str, told[first:])) == {str(("ensemble_stage", {"run": "first", "stage": "search"}, RUNNING))}
    time.sleep(0.1)
    assert len(told) == after


def test_labels_have_few_values():
    assert {label for figure in FIGURES.values() for label in figure.labels} == {"run", "stage", "unit", "reason"}


# The dashboard and Prometheus' files -----------------------------------------------------------------------------------------


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\bray_[a-z0-9_]+\b", re.sub(r'"[^"]*"', "", expression)))


def test_the_dashboard_is_one_that_grafana_takes():
    assert BOARD["schemaVersion"] >= 36
    for key in ("uid", "title", "panels", "templating", "time", "refresh", "annotations"):
        assert BOARD[key], key
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,40}", BOARD["uid"])
    assert "id" not in BOARD, "an id of one Grafana is another dashboard's elsewhere"
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    variables = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert names_in(variables["run"]["query"]["query"]) <= exported_names()
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in PANELS:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["fieldConfig"]["defaults"]["unit"]
        references = [target["refId"] for target in panel["targets"]]
        assert references
        assert len(set(references)) == len(references)
        for target in panel["targets"]:
            assert target["expr"].count("(") == target["expr"].count(")")
            assert set(re.findall(r"\$\{?([a-z]+)", target["expr"])) <= variables.keys()
    states = next(panel for panel in PANELS if panel["type"] == "state-timeline")["fieldConfig"]["defaults"]["mappings"]
    assert set(states[0]["options"]) == {str(state) for state in range(4)}


def test_the_dashboard_shows_every_figure_of_the_package_and_none_that_is_not():
    shown = set().union(*map(names_in, EXPRESSIONS))
    own = {name for name in shown if name.startswith("ray_ensemble_")}
    assert own <= exported_names()
    assert {f"ray_{name}" for name in FIGURES} == {re.sub(r"_(total|bucket)$", "", n) for n in own - TOTALS} | TOTALS
    for expression in EXPRESSIONS:
        for name in names_in(expression) & own:
            labels = set(FIGURES[re.sub(r"^ray_|_total$|_bucket$", "", name)].labels) if name not in TOTALS else set()
            labels |= {"run", "stage", "unit"} if name in TOTALS else {"le"} if name.endswith("_bucket") else set()
            for by in re.findall(rf"by \(([a-z, ]+)\) \((?:rate\()?{name}\b", expression):
                assert set(by.split(", ")) <= labels, expression


TOTALS = {"ray_ensemble_total"}  # a gauge whose own name ends so


def test_prometheus_finds_the_nodes_and_the_pods():
    scrape = yaml.safe_load((CLUSTER / "prometheus.yaml").read_text())["scrape_configs"][0]
    found = scrape["http_sd_configs"][0]
    assert found["url"].endswith("/api/prometheus/sd")
    assert "credentials" not in found["authorization"], "a file holds the token"
    monitor = yaml.safe_load((CLUSTER / "kuberay" / "monitor.yaml").read_text())["spec"]
    network = yaml.safe_load((CLUSTER / "kuberay" / "network.yaml").read_text())["spec"]
    ports = {port["port"] for rule in network["ingress"] for port in rule.get("ports", [])}
    for name in ("raycluster.yaml", "rayjob.yaml"):
        spec = yaml.safe_load((CLUSTER / "kuberay" / name).read_text())["spec"]
        spec = spec.get("rayClusterSpec", spec)
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            template = group["template"]
            assert monitor["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
            named = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
            assert named[monitor["podMetricsEndpoints"][0]["port"]] in ports


# A real exporter -------------------------------------------------------------------------------------------------------------


class Frail:
    """Does its units; the one called `dies` ends the process the first time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def work(self, unit: str) -> str:
        if unit == "dies" and not (self.folder / "died").exists():
            (self.folder / "died").touch()
            os._exit(1)
        return unit


class Watcher(threading.Thread):
    """Reads this node's exporter each second, as Prometheus would, and keeps each series' last value."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
        self._end = threading.Event()

    def __enter__(self) -> Watcher:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self.join()

    def run(self) -> None:
        import ray

        node = next(found for found in ray.nodes() if found["NodeID"] == ray.get_runtime_context().get_node_id())
        while not self._end.wait(1):
            text = requests.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=60).text
            for name, labels, value in re.findall(r"^(\w+)(?:\{(.*)\})? (\S+)$", text, re.M):
                series = frozenset(re.findall(r'(\w+)="([^"]*)"', labels))
                self.seen.setdefault(name, {})[series] = float(value)

    def of_run(self, name: str, run: str, **labels: str) -> float | None:
        wanted = {"run": run, **labels}.items()
        return next((value for its, value in self.seen.get(name, {}).items() if wanted <= dict(its).items()), None)

    def wait_for(self, name: str, run: str) -> None:
        deadline = time.monotonic() + 180
        while self.of_run(name, run) is None:
            assert time.monotonic() < deadline, f"the exporter does not have {name}"
            time.sleep(0.5)


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_is_seen_at_the_exporter_and_so_is_all_that_the_dashboard_asks_for(ray_cluster, whole_job, tmp_path):
    lost: list[str] = []
    with Watcher() as exported:
        folder = Job.from_yaml(whole_job, ["training.pack=3", "search.trials=2"]).run(tmp_path / "watched").folder
        with run_figures("frail") as figures:
            figures.stage("gradients", RUNNING)
            size = PoolSize(1, 1)
            actors = PlainActors(Frail, (tmp_path,), GradientsConfig(), size)
            map_units(actors, "work", {"a": "a", "b": "dies"}, size=size, on_result=lambda name, _: lost.append(name))
            # What this machine does not do: a cluster where everything happened.
            for name in ("ensemble_adapters_failed", "ensemble_memory_halvings", "ensemble_preemptions"):
                figures.count(name)
            figures.count("ensemble_training_interruptions", reason="memory")
            exported.wait_for("ray_ensemble_training_interruptions_total", "frail")
    for stage in STAGES:
        assert exported.of_run("ray_ensemble_stage", "watched", stage=stage) == WHOLE
        seconds = json.loads((folder / "manifests" / f"{stage}.json").read_text())["seconds"]
        assert exported.of_run("ray_ensemble_stage_seconds", "watched", stage=stage) == pytest.approx(seconds)
    gradients = {"stage": "gradients", "unit": "examples"}
    assert exported.of_run("ray_ensemble_total", "watched", **gradients) == 4 * (24 + 8)
    assert exported.of_run("ray_ensemble_done", "watched", **gradients) == 4 * (24 + 8)
    trained = len(json.loads((folder / "partition.json").read_text())["groups"]) + 1
    assert exported.of_run("ray_ensemble_adapters_trained_total", "watched", stage="train") == trained
    assert exported.of_run("ray_ensemble_actors_lost_total", "watched") is None
    assert sorted(lost) == ["a", "b"]
    assert exported.of_run("ray_ensemble_actors_lost_total", "frail") == 1
    assert exported.of_run("ray_ensemble_unit_seconds_count", "frail") == 2
    # Every name of ours is there as we say, and so is every name of Ray's that the dashboard asks for.
    found = set(exported.seen)
    assert exported_names() <= found
    assert {name for name in found if name.startswith("ray_ensemble_")} <= exported_names()
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    asked = set().union(*map(names_in, EXPRESSIONS))
    assert {f"ray_{name}" for name in METRICS_GAUGES} >= GPU
    assert asked - found <= GPU
