import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ensemble.evaluation import metrics
from ray_ensemble.evaluation.metrics import (
    bootstrap_interval,
    losses_and_hits,
    metric,
    paired_difference,
    wilson_interval,
)
from ray_ensemble.evaluation.summary import summarise


def draw(n=40, k=4, seed=0):
    generator = np.random.default_rng(seed)
    return generator.normal(scale=3, size=(n, k)), generator.integers(k, size=n)


def slow_loss(row, label):
    total = sum(math.exp(s) for s in row)
    return -math.log(math.exp(row[label]) / total)


def slow_interval(strata, seed, resamples=2000):
    """One resample at a time, with the picks that numpy's generator gives for (seed, task)."""
    means = []
    for index, values in enumerate(strata):
        picks = np.random.default_rng([seed, index]).integers(len(values), size=(resamples, len(values)))
        means.append([sum(values[i] for i in row) / len(row) for row in picks])
    overall = sorted(sum(column) / len(strata) for column in zip(*means, strict=True))
    return [np.percentile(overall, 2.5), np.percentile(overall, 97.5)]


def test_losses_and_hits_are_those_of_the_definition():
    scores, labels = draw()
    losses, hits = losses_and_hits(scores, labels)
    assert losses == pytest.approx([slow_loss(row, label) for row, label in zip(scores, labels, strict=True)])
    assert hits.tolist() == [max(range(4), key=lambda k: row[k]) == y for row, y in zip(scores, labels, strict=True)]


def test_loss_is_log_one_plus_exp_of_minus_margin():
    scores, labels = draw(k=3)
    rows = np.arange(len(labels))
    others = np.ma.masked_array(np.exp(scores), mask=np.eye(3, dtype=bool)[labels]).sum(axis=1)
    margin = scores[rows, labels] - np.log(np.asarray(others))
    assert losses_and_hits(scores, labels)[0] == pytest.approx(np.log1p(np.exp(-margin)))


def test_absent_labels_change_nothing():
    scores, labels = draw(k=2)
    padded = np.concatenate([scores, np.full((len(scores), 3), -np.inf)], axis=1)
    np.testing.assert_array_equal(losses_and_hits(padded, labels)[0], losses_and_hits(scores, labels)[0])
    assert metric(padded, labels) == metric(scores, labels)


@given(st.floats(-1e4, 1e4))
@settings(max_examples=20, deadline=None)
def test_a_shift_of_all_scores_changes_nothing(shift):
    scores, labels = draw()
    assert losses_and_hits(scores + shift, labels)[0] == pytest.approx(losses_and_hits(scores, labels)[0], abs=1e-9)


def test_far_scores_neither_overflow_nor_go_negative():
    losses, hits = losses_and_hits([[-5000.0, 5000.0], [-5000.0, 5000.0]], [0, 1])
    assert losses.tolist() == [10000.0, 0.0]
    assert hits.tolist() == [False, True]


def test_of_equal_scores_the_first_label_is_predicted():
    assert losses_and_hits([[1.0, 1.0], [1.0, 1.0]], [0, 1])[1].tolist() == [True, False]


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (np.zeros((0, 2)), np.zeros(0, dtype=int), "no examples"),
        (np.zeros((2, 2)), [0], "do not go with"),
        (np.zeros((2, 2)), [0, 2], "labels from 0 to 2"),
        (np.zeros((2, 2)), [0, -1], "labels from -1 to 0"),
        (np.zeros((2, 2)), [0.0, 1.0], "indices"),
        ([[0.0, np.nan]], [0], "NaN"),
        ([[0.0, np.inf]], [0], "inf"),
        ([[0.0, 0.0], [0.0, -np.inf]], [0, 1], "example 1 "),
    ],
)
def test_wrong_input_is_refused(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        losses_and_hits(scores, labels)


def test_metric_has_the_keys_of_metrics_json_and_is_json():
    scores, labels = draw()
    found = metric(scores.astype(np.float32), labels.astype(np.int32), seed=3)
    assert list(found) == ["loss", "accuracy", "n", "loss_interval", "accuracy_interval"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["n"] == 40
    assert found["loss_interval"][0] < found["loss"] < found["loss_interval"][1]
    assert found["accuracy_interval"][0] < found["accuracy"] < found["accuracy_interval"][1]


def test_same_seed_same_interval_other_seed_another():
    scores, labels = draw()
    assert metric(scores, labels, seed=1) == metric(scores, labels, seed=1)
    assert metric(scores, labels, seed=1)["loss_interval"] != metric(scores, labels, seed=2)["loss_interval"]


@pytest.mark.parametrize(  # Newcombe (1998), table I, without continuity correction
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_published_values(hits, n, low, high):
    assert wilson_interval(hits, n) == pytest.approx([low, high], abs=5e-5)


def test_wilson_is_symmetric_and_stays_within_zero_and_one():
    for hits in range(11):
        low, high = wilson_interval(hits, 10)
        assert 0.0 <= low <= hits / 10 <= high <= 1.0
        assert wilson_interval(10 - hits, 10) == pytest.approx([1 - high, 1 - low])
    for hits, n in [(-1, 3), (4, 3), (0, 0)]:
        with pytest.raises(ValueError, match="hits out of"):
            wilson_interval(hits, n)


def test_bootstrap_equals_the_slow_one():
    generator = np.random.default_rng(1)
    strata = [generator.exponential(size=7), generator.exponential(size=12)]
    assert bootstrap_interval(strata, seed=5) == pytest.approx(slow_interval(strata, 5))


def test_blocks_of_resamples_do_not_change_the_interval(monkeypatch):
    values = [np.random.default_rng(2).normal(size=33)]
    whole = bootstrap_interval(values, seed=4)
    monkeypatch.setattr(metrics, "_CHUNK", 33 * 7)
    assert bootstrap_interval(values, seed=4) == whole


def test_bootstrap_interval_agrees_with_the_normal_one_on_many_examples():
    values = np.random.default_rng(3).exponential(size=3000)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert bootstrap_interval([values]) == pytest.approx([values.mean() - half, values.mean() + half], abs=0.15 * half)


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(4)
    covered = 0
    for _ in range(200):
        low, high = bootstrap_interval([generator.normal(1.0, 1.0, size=60)], resamples=400)
        covered += low <= 1.0 <= high
    assert 176 <= covered <= 200  # 190 ± 4.6 standard errors


def test_constant_values_have_an_interval_of_width_zero():
    assert bootstrap_interval([[2.0] * 5, [4.0] * 3]) == [3.0, 3.0]


def test_paired_difference_averages_over_tasks_not_over_examples():
    found = paired_difference([[1.0] * 2, [5.0] * 100], [[0.0] * 2, [5.0] * 100])
    assert found == {"difference": 0.5, "interval": [0.5, 0.5]}


def test_paired_difference_is_the_slow_one_with_the_same_indices_for_both():
    generator = np.random.default_rng(6)
    a = [generator.normal(size=9), generator.normal(size=14)]
    b = [generator.normal(size=9), generator.normal(size=14)]
    draws = []
    for index in range(2):
        picks = np.random.default_rng([8, index]).integers(len(a[index]), size=(2000, len(a[index])))
        draws.append([a[index][row].mean() - b[index][row].mean() for row in picks])
    overall = np.mean(draws, axis=0)
    found = paired_difference(a, b, seed=8)
    assert found["interval"] == pytest.approx(np.percentile(overall, [2.5, 97.5]))
    assert found["difference"] == pytest.approx(np.mean([x.mean() - y.mean() for x, y in zip(a, b, strict=True)]))


def test_pairing_narrows_the_interval_of_correlated_models():
    generator = np.random.default_rng(7)
    hard = [generator.exponential(2.0, size=60) for _ in range(3)]
    a = [h + generator.normal(0, 0.1, size=60) for h in hard]
    b = [h + generator.normal(0.05, 0.1, size=60) for h in hard]
    low, high = paired_difference(a, b)["interval"]
    alone = [bootstrap_interval(x, seed) for x, seed in ((a, 0), (b, 1))]
    unpaired = math.hypot(*(hi - lo for lo, hi in alone))
    assert high - low < unpaired / 5
    assert high < 0  # b is worse by .05, which only the paired interval can tell


def test_swapping_the_models_swaps_the_sign():
    generator = np.random.default_rng(8)
    a, b = [generator.random(20) < 0.7], [generator.random(20) < 0.5]
    there, back = paired_difference(a, b, seed=1), paired_difference(b, a, seed=1)
    assert there["difference"] == pytest.approx(-back["difference"])
    assert there["interval"] == pytest.approx([-x for x in reversed(back["interval"])])


def test_merged_is_held_against_unmerged_on_every_task():
    outputs, labels = {}, {}
    for place, name in enumerate(("a", "b")):
        scores, labels[name] = draw(seed=place)
        merged = scores + np.random.default_rng(place).normal(size=scores.shape) if name == "b" else scores
        outputs[name] = {"base": scores, "qlora_all": scores, "group": scores, "ensemble": scores, "merged": merged}
    found = summarise(outputs, labels)["paired"]["merged_vs_ensemble"]
    nothing = {"difference": 0.0, "interval": [0.0, 0.0]}
    assert found["tasks"]["a"] == {"loss": nothing, "accuracy": nothing}
    for place, what in enumerate(("loss", "accuracy")):
        ours, theirs = (losses_and_hits(outputs["b"][model], labels["b"])[place] for model in ("merged", "ensemble"))
        assert found["tasks"]["b"][what] == paired_difference([ours], [theirs])
        assert found[what]["difference"] == pytest.approx(found["tasks"]["b"][what]["difference"] / 2)
    assert found["tasks"]["b"]["loss"]["difference"] != 0


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [([], [], "no tasks"), ([[1.0]], [], "1 tasks"), ([[1.0]], [[1.0, 2.0]], "task 0"), ([[]], [[]], "at least one")],
)
def test_what_cannot_be_paired_is_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(a, b)
