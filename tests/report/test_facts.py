import json

import pytest

from ray_ensemble.report import facts
from ray_ensemble.report.load import load_run


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5764, "0.576"),
        (-0.0123, "−0.012"),
        (-0.0001, "0.000"),
        (None, "–"),
        (float("nan"), "–"),
        (True, "–"),
        (3, "3.000"),
    ],
)
def test_numbers(value, text):
    assert facts.number(value) == text


def test_signs_and_shares():
    assert facts.number(0.02, sign=True) == "+0.020"
    assert facts.number(-0.00001, sign=True) == "0.000"
    assert facts.change("accuracy", 0.0375, [0.01, 0.0625]) == "+3.8 points [+1.0, +6.2]"
    assert facts.change("loss", -0.046, (-0.061, -0.031)) == "−0.046 [−0.061, −0.031]"
    assert facts.span("accuracy", [0.331, 0.575]) == "[33.1–57.5]"
    assert [facts.share(x) for x in (0.0, 1e-4, 0.11)] == ["0.00", "<0.01", "0.11"]


def test_quantities():
    assert [facts.seconds(x) for x in (1.23, 96, 871, 3 * 3600 + 90)] == ["1.2 s", "96 s", "14 min 31 s", "3 h 02 min"]
    assert [facts.size(x) for x in (3 * 2**20, 1.5 * 2**30)] == ["3 MiB", "1.5 GiB"]
    assert [facts.operations(x) for x in (0.0, 3e10, 1.95e14)] == ["0 FLOP", "30 GFLOP", "195 TFLOP"]
    assert {facts.seconds(None), facts.size(None), facts.operations("x")} == {"–"}


def test_names_from_data_are_one_line_without_control_characters():
    assert facts.plain("a\nb\x1b[31m\u202ec") == "a b [31m c"
    assert facts.plain("x" * 30, 10) == "x" * 9 + "…"


@pytest.mark.parametrize(
    ("measure", "interval", "verdict"),
    [
        ("loss", (-0.2, -0.1), "is better"),
        ("loss", (0.1, 0.2), "WORSE"),
        ("accuracy", (-0.2, -0.1), "WORSE"),
        ("accuracy", (0.1, 0.2), "is better"),
        ("loss", (-0.1, 0.1), "holds 0"),
        ("accuracy", (0.0, 0.2), "holds 0"),
        ("loss", None, "chance"),
    ],
)
def test_verdict_follows_the_interval_and_the_direction_of_the_measure(measure, interval, verdict):
    assert verdict in facts.Comparison(measure, 0.0, interval).verdict


def test_worse_datasets_are_found_in_both_measures(run_folder):
    data = load_run(run_folder)
    assert [task for task, _ in facts.worse(data, "loss")] == ["stance"]
    (task, by), *_ = facts.worse(data, "accuracy")
    assert task == "stance"
    ours, theirs = (data.measured("stance", name)["accuracy"] for name in ("ensemble", "qlora_all"))
    assert by == pytest.approx(theirs - ours)


def test_comparison_without_a_paired_interval_is_that_of_the_means(run_folder):
    path = run_folder / "metrics.json"
    metrics = json.loads(path.read_text())
    del metrics["paired"]
    path.write_text(json.dumps(metrics))
    found = facts.comparison(load_run(run_folder), "loss")
    assert found is not None
    assert found.difference == metrics["mean"]["ensemble"]["loss"] - metrics["mean"]["qlora_all"]["loss"]
    assert found.interval is None


def test_extremes_hold_the_best_and_the_worst_in_order(run_folder):
    data = load_run(run_folder)
    assert facts.extremes(data, 8) == data.order
    kept = facts.extremes(data, 4)
    gains = sorted(data.order, key=lambda task: facts.gain(data, task, "loss"))
    assert set(kept) == {*gains[:2], *gains[-2:]}
    assert list(kept) == [task for task in data.order if task in kept]


def test_flops_ratio_is_the_sum_of_its_parts(run_folder):
    data = load_run(run_folder)
    parts = sum(part.flops for part in facts.flops_parts(data))
    assert facts.flops_ratio(data) == pytest.approx(parts / facts.flops_reference(data))
    assert facts.ratio_parts(data)[1] == "search <0.01"
