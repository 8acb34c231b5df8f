import base64
import json
import re
import shutil
from collections import defaultdict
from html.parser import HTMLParser

import pytest

from ray_ensemble.errors import InputError
from ray_ensemble.report import write_report
from ray_ensemble.report.figures import affinity_map
from ray_ensemble.report.load import load_run
from ray_ensemble.report.markup import Html, element, table
from ray_ensemble.report.page import page

EVIL = "<script>alert('x')</script>"
PLOTS = {"affinity.png", "cost.png", "estimates.png", "search.png", "test.png", "training.png"}


class Page(HTMLParser):
    """Tags, attributes, visible text, and that every element is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.extend((tag, key, value or "") for key, value in attrs)
        if tag not in ("meta", "img", "source", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def report(run_of):
    folder = run_of()
    return write_report(folder)


@pytest.fixture(scope="module")
def html(report):
    return report.read_text(encoding="utf-8")


def test_report_and_plots_are_where_the_design_says(report):
    assert report.name == "report.html"
    assert {path.name for path in (report.parent / "plots").iterdir()} == PLOTS
    assert not [path for path in report.parent.iterdir() if path.name.startswith(".")]


def test_nothing_is_fetched_and_nothing_runs(html):
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    for _, key, value in page.attributes:
        if key in ("src", "srcset", "href", "action"):
            assert value.startswith("data:image/png;base64,")
        assert not key.startswith("on")
        assert "://" not in value
    assert "url(" not in html
    assert "@import" not in html


def test_light_and_dark_pictures_are_the_plots(html, report):
    sources = [value for _, key, value in Page(html).attributes if key == "srcset"]
    images = [value for tag, key, value in Page(html).attributes if tag == "img" and key == "src"]
    assert len(sources) == len(images) == len(PLOTS)
    assert not set(sources) & set(images)
    decoded = {base64.b64decode(image.partition(",")[2]) for image in images}
    assert decoded == {path.read_bytes() for path in (report.parent / "plots").iterdir()}
    assert html.count("prefers-color-scheme: dark") == len(PLOTS)


def test_tables_hold_all_tasks_in_the_order_of_the_groups(html, report):
    order = load_run(report.parent).order
    for block in re.findall(r"<tbody>.*?</tbody>", html, re.S):
        first = re.findall(r"<tr><td>(.*?)</td>", block)
        if set(first) & set(order):
            assert first == list(order)
    assert len(re.findall(r"<tr><td>sst2</td>", html)) == 4  # results, parts, weights, datasets


def test_figures_are_those_of_the_metrics(html, report):
    metrics = json.loads((report.parent / "metrics.json").read_text())
    text = Page(html).text
    for variants in [*metrics["tasks"].values(), metrics["mean"]]:
        for found in variants.values():
            assert f"{found['loss']:.3f}" in text
            assert f"{100 * found['accuracy']:.1f}%" in text
    low, high = metrics["tasks"]["trec"]["ensemble"]["loss_interval"]
    assert f"[{low:.3f}–{high:.3f}]" in text


def test_what_fell_short_is_told_plainly(html, report):
    text = Page(html).text
    assert "Ensemble worse than one QLoRA on all in loss on 1 of 8: stance (+" in text
    assert "in accuracy on 1 of 8: stance (−" in text
    assert "It took 1.14 times the FLOPs" in text
    assert "Prompts shortened to fit 48 tokens: hate (5)." in text
    assert "No validation was run" in text


def test_datasets_that_do_harm_are_named(run_of):
    folder = run_of()
    path = folder / "partition.json"
    partition = json.loads(path.read_text())
    assert "do harm" not in page_text(folder)  # a search that did not look says nothing
    path.write_text(json.dumps({**partition, "harmful": []}))
    assert "No dataset was found to harm every group" in page_text(folder)
    harm = {"task": "trec", "effect": -0.0213, "standard_error": 0.004, "partners": 7, "better": 0}
    path.write_text(json.dumps({**partition, "harmful": [harm]}))
    text = page_text(folder)
    assert "Datasets that do harm" in text
    assert "trec harms what trains beside it: joining their groups costs 7 other datasets 0.021 ± 0.004" in text


def test_datasets_that_are_not_learnt_are_named(run_of):
    folder = run_of()
    assert "not learnt" not in page_text(folder)
    partition = json.loads((folder / "partition.json").read_text())
    each = {"task": "rte", "gain": -0.0213, "standard_error": 0.03}
    (folder / "partition.json").write_text(json.dumps({**partition, "unlearnt": [each]}))
    text = page_text(folder)
    assert "Datasets that are not learnt" in text
    assert "rte: −0.021 ± 0.030" in text


def page_text(folder):
    return Page(write_report(folder).read_text(encoding="utf-8")).text


def test_definitions_seeds_and_configuration_are_there(html, report):
    text = Page(html).text
    for words in ("−log softmax", "FLOPs ratio", "Touched once", "Wilson", "chosen partition 7", "d = 400", "group-0"):
        assert words in text
    config = (report.parent / "config.yaml").read_text()
    assert " ".join(config.split()) in text


def test_same_inputs_give_the_same_bytes_anywhere(report, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(report.parent, copy)
    (copy / "report.html").unlink()
    shutil.rmtree(copy / "plots")
    assert write_report(copy).read_bytes() == report.read_bytes()


def test_names_and_labels_from_data_are_escaped(run_of):
    groups = [[EVIL, 'quote" onload="x'], ["$x$ {y} \\frac"]]
    folder = run_of(groups=groups, labels={EVIL: ["<img src=x>", "&amp;"]}, n=8)
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["seconds"]["<b>stage</b>"] = 1.0
    metrics["paired"]["<i>_vs_base"] = {"loss": {"difference": 0.1, "interval": [0.0, 0.2]}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "validation.json").write_text(json.dumps({"<u>key": "<u>value", "loss_error": 0.043}))
    html = write_report(folder).read_text()
    page = Page(html)
    assert not {"script", "b>stage", "u", "i"} & set(page.tags)
    assert {key for tag, key, _ in page.attributes if tag == "img"} == {"src", "alt", "width"}
    for words in (EVIL, "<img src=x>", "&amp;", 'quote" onload="x', "<u>value", "<b>stage</b>", "0.043"):
        assert words in page.text
    assert "No validation was run" not in page.text


def test_merged_is_shown_against_unmerged_for_every_dataset(run_of):
    folder = run_of(groups=[["sst2", "cr"]])
    metrics, ensemble = (json.loads((folder / f"{name}.json").read_text()) for name in ("metrics", "ensemble"))
    pair = {
        "loss": {"difference": 0.0312, "interval": [-0.01, 0.0724]},
        "accuracy": {"difference": -0.0123, "interval": [-0.05, 0.025]},
    }
    metrics["paired"]["merged_vs_ensemble"] = {**pair, "tasks": {"sst2": pair}}
    ensemble["merged"] = {
        "sst2": {"rank": 12, "norm_kept": 0.875, "vllm_max_lora_rank": 16, "share": 0.25},
        "cr": {"rank": 4, "norm_kept": 1.0, "vllm_max_lora_rank": 8},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "ensemble.json").write_text(json.dumps(ensemble))
    text = Page(write_report(folder).read_text()).text
    assert "sst2 12 0.25 87.5% +0.031 [−0.010, +0.072] −1.2 points [−5.0, +2.5]" in text
    assert "cr 4 – 100.0% – –" in text
    assert "vLLM serves them with --max-lora-rank 16." in text


def test_a_common_start_has_a_column_of_weights_and_no_group(run_of):
    folder = run_of()
    path = folder / "ensemble.json"
    ensemble = json.loads(path.read_text())
    ensemble["adapters"] = [*ensemble["adapters"], "start"]
    ensemble["weights"] = {task: [*(0.5 * w for w in found), 0.5] for task, found in ensemble["weights"].items()}
    path.write_text(json.dumps(ensemble))
    text = Page(write_report(folder).read_text()).text
    head = " ".join(["dataset", *ensemble["adapters"]])
    assert head in " ".join(text.split())
    assert load_run(folder).adapters == tuple(ensemble["adapters"][:-1])


def test_what_is_missing_is_told_in_words(run_of):
    folder = run_of()
    for name in ("plan.json", "search/trials.csv"):
        (folder / name).unlink()
    shutil.rmtree(folder / "adapters")
    shutil.rmtree(folder / "baselines")
    partition = json.loads((folder / "partition.json").read_text())
    del partition["estimates"]
    (folder / "partition.json").write_text(json.dumps(partition))
    metrics = json.loads((folder / "metrics.json").read_text())
    for key in ("paired", "flops", "seconds", "peak_memory_bytes"):
        del metrics[key]
    for variants in [*metrics["tasks"].values(), metrics["mean"]]:
        del variants["merged"]
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "plots").mkdir()
    (folder / "plots" / "cost.png").write_bytes(b"of an earlier report")
    text = Page(write_report(folder).read_text()).text
    for words in (
        "no plan.json",
        "no search/trials.csv",
        "no plot against m",
        "no curves",
        "no estimates by dataset",
        "no paired interval was computed",
        "Not measured in this run: ensemble merged",
        "FLOPs were not counted",
        "neither seconds nor memory",
        "peak memory was not measured",
    ):
        assert words in text, words
    assert {path.name for path in (folder / "plots").iterdir()} == {"affinity.png", "test.png"}


def test_one_task_alone_is_reported(run_of):
    text = Page(write_report(run_of(groups=[["only"]], n=5)).read_text()).text
    assert "1 dataset, 1 group" in text
    assert "fewer than two datasets" in text


def test_accuracy_as_objective_is_named(run_of):
    folder = run_of(groups=[["a", "b"], ["c"]], n=5)
    for name in ("partition.json", "affinity.json"):
        data = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**data, "metric": "accuracy"}))
    data = load_run(folder)
    text = Page(page(data, defaultdict(lambda: Html("")))).text
    assert "Estimated mean validation 1 − accuracy: 0.418" in text
    assert "worse (red) the estimated accuracy of dataset i" in affinity_map(data).caption


def test_a_run_without_metrics_is_refused_and_nothing_is_written(run_folder):
    (run_folder / "metrics.json").unlink()
    with pytest.raises(InputError, match=r"metrics\.json.*missing"):
        write_report(run_folder)
    assert not (run_folder / "report.html").exists()
    assert not (run_folder / "plots").exists()


def test_markup_escapes_everything_but_itself():
    assert element("p", "<b>", element("b", "&"), title='"') == '<p title="&quot;">&lt;b&gt;<b>&amp;</b></p>'
    assert isinstance(table(["<"], [["<td>"]]), Html)
    assert "&lt;td&gt;" in table(["<"], [["<td>"]])


def test_boosting_steps_are_told_those_that_failed_too(boosted_folder, html):
    text = Page(write_report(boosted_folder).read_text(encoding="utf-8")).text
    assert "booster-0 group-0 0.913 0.752 0.887 0.841 sst2 1.25, cr 0.00" in text
    assert "booster-1 (left out) group-1 – – – – –" in text
    assert "Boosting ended: to first order no booster lowers the validation loss of group 1." in text
    assert "There were no boosting steps." in Page(html).text


def test_held_out_losses_and_routing_are_shown_where_they_were_measured(routed_folder, run_folder):
    def shown(folder):
        return Page(str(page(load_run(folder), defaultdict(lambda: Html(""))))).text

    text = shown(routed_folder)
    assert "own group only uniform weights" in text
    assert "0.410 0.430 0.520" in text
    assert "router's accuracy" in text
    assert "94.1% 73.1%" in text
    assert "ensemble, dataset not known" in text
    plain = shown(run_folder)
    assert "router's accuracy" not in plain
    assert "Held-out validation loss" not in plain
    assert "uniform weights" not in plain
