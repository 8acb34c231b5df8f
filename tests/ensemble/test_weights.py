"""Ensemble weights and step sizes: optimal by a slow search, held back where data say little, and right in expectation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.special import log_softmax

from ray_ensemble.ensemble.weights import (
    add_up,
    best_step,
    booster_scores,
    coefficients,
    combine,
    fit_scale,
    fit_step_size,
    fit_weights,
    label_losses,
    learn_step_sizes,
    learn_weights,
    scale_of,
)

OWN, ALIKE = np.array([1.0, 0.0, 0.0]), np.full(3, 1 / 3)


def loss(scores, labels, w, prior, strength, scale):
    """The objective of a fit, with weights times scale; where the prior has no weight only their size counts."""
    values = log_softmax(combine(scores, np.asarray(w)), axis=1)[np.arange(len(labels)), labels]
    u = np.asarray(w) / scale
    apart = sum(p * np.log(p / max(each, 1e-12)) - p + each if p else each for p, each in zip(prior, u, strict=True))
    return -values.mean() + strength / len(labels) * apart


def random_scores(seed, adapters=3, count=40, classes=3):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    scores = generator.normal(size=(adapters, count, classes)) * 2
    for g in range(adapters):
        scores[g, np.arange(count), labels] += g
    return scores, labels


@pytest.mark.parametrize(("prior", "strength", "scale"), [(OWN, 2.0, 1.0), (OWN, 0.1, 0.5), (ALIKE, 5.0, 2.0)])
@pytest.mark.parametrize("seed", range(2))
def test_no_point_of_a_grid_is_better(seed, prior, strength, scale):
    scores, labels = random_scores(seed)
    w = fit_weights(scores, labels, prior, strength, scale)
    assert w.min() >= 0
    best = min(
        loss(scores, labels, g, prior, strength, scale) for g in itertools.product(np.linspace(0, 2, 17), repeat=3)
    )
    assert loss(scores, labels, w, prior, strength, scale) <= best + 1e-4


def test_strength_goes_from_the_data_to_the_prior():
    scores, labels = random_scores(0)
    for prior in (OWN, ALIKE):
        fits = [fit_weights(scores, labels, prior, c, 0.8) for c in (0.1, 4, 64, 1e4, np.inf)]
        distances = [np.abs(w - 0.8 * prior).sum() for w in fits]
        assert distances == sorted(distances, reverse=True)
        assert distances[0] > 0.5
        assert distances[-2] < 0.05
        np.testing.assert_array_equal(fits[-1], 0.8 * prior)


def test_the_shared_scale_is_the_lowest_of_a_grid_and_every_dataset_counts_the_same():
    data = [random_scores(seed, count=count) for seed, count in ((0, 8), (1, 200))]
    scores, labels = [s * 3 for s, _ in data], [y for _, y in data]
    priors, grid = [OWN, ALIKE], np.linspace(0.01, 1.5, 1491)

    def objective(scale, expected):
        of_losses = [
            label_losses(combine(s, scale * p), y).mean() for s, p, y in zip(scores, priors, labels, strict=True)
        ]
        return np.mean(of_losses) + (scale / expected - np.log(scale / expected)) / 208

    for expected in (1.0, 0.1):
        lowest = grid[np.argmin([objective(scale, expected) for scale in grid])]
        assert 0.01 < lowest < 1.5
        assert fit_scale(scores, labels, priors, expected) == pytest.approx(lowest, abs=1e-3)
    assert fit_scale([s[:, :0] for s in scores], [y[:0] for y in labels], priors, 0.7) == 0.7


def test_a_few_examples_that_are_all_right_do_not_make_the_scale_endless():
    labels = np.array([0, 1, 0, 1])
    scores = np.stack([np.eye(2)[labels]] * 3)
    shared = fit_scale([scores], [labels], [OWN])
    assert 1 < shared < 10
    found = learn_weights([scores], [labels], [OWN])
    assert found.scales[0] < 3 * shared


def test_adapters_that_are_surer_than_they_are_right_are_scaled_down_and_keep_their_weight():
    """Each is the truth times six; on the simplex alone an adapter that knows nothing would get most of the weight."""
    generator = np.random.default_rng(3)
    scores, labels = drawn(generator, (2.0, 2.0), 4000, 3)
    scores = np.concatenate([6 * scores, 0.01 * generator.normal(size=(1, 4000, 3))])
    found = learn_weights([scores[:, :80]], [labels[:80]], [np.array([1.0, 0.0, 0.0])])
    assert found.scales[0] < 0.4
    assert found.weights[0][2] < 0.15
    test, truth = scores[:, 80:], labels[80:]
    scaled = label_losses(combine(test, found.scaled[0]), truth).mean()
    calibrated = label_losses(combine(test, np.array([1 / 6, 0.0, 0.0])), truth).mean()
    assert scaled < calibrated


def test_equal_adapters_leave_the_weight_with_the_own_group():
    scores, labels = random_scores(0, adapters=1)
    w = fit_weights(np.repeat(scores, 3, axis=0), labels, np.array([0.0, 1.0, 0.0]), 2.0)
    assert w[1] > 0.99 * w.sum()


def drawn(generator, skills, count, classes):
    """Scores of adapters that know the label more or less well, and partly err alike: a truth that can be sampled for ever."""
    labels = generator.integers(0, classes, count)
    scores = generator.normal(size=(count, classes)) + generator.normal(size=(len(skills), count, classes))
    scores[:, np.arange(count), labels] += np.array(skills)[:, None]
    return scores, labels


def simulated(skills_of, count, runs=3, datasets=6):
    """Expected losses over datasets and runs of the own group alone, of learned weights, of hardly a pull, and at the optimum."""
    found = []
    for run in range(runs):
        generator = np.random.default_rng([run, count])
        for_one_run = []
        for i in range(datasets):
            own = np.eye(3)[i % 3]
            skills = np.roll(skills_of(i), i % 3)
            scores, labels = drawn(generator, skills, count + 3000, 2 + i % 2)
            for_one_run.append((own, scores[:, :count], labels[:count], scores[:, count:], labels[count:]))
        learned = learn_weights(
            [s for _, s, _, _, _ in for_one_run], [y for _, _, y, _, _ in for_one_run], [p for p, *_ in for_one_run]
        )
        for (own, s, y, test, truth), weights in zip(for_one_run, learned.scaled, strict=True):
            kinds = (own, weights, fit_weights(s, y, own, 0.1), fit_weights(test, truth, own, 0.1))
            found.append([label_losses(combine(test, w), truth).mean() for w in kinds])
    return np.mean(found, axis=0)


def test_in_expectation_learned_weights_lose_nothing_to_the_own_group_and_gain_where_there_is_something_to_gain():
    """Datasets whose optimum is known from 3,000 examples: the own group by far, another by far, or all together."""
    own, learned, unshrunk, _ = simulated(lambda i: (2.0, 0.4, 0.4), 10)
    assert unshrunk > own + 0.02, "a fit on ten examples alone overfits"
    assert learned - own < 0.4 * (unshrunk - own)
    own, learned, *_ = simulated(lambda i: (2.0, 0.4, 0.4), 40)
    assert learned <= own + 0.01, "the scale is fitted too, where it is right as it is"
    for skills in ((0.8, 2.0, 0.4), (1.3, 1.3, 1.3)):
        own, learned, _, optimum = simulated(lambda i, skills=skills: skills, 120)
        assert learned < own - 0.5 * (own - optimum)
        assert learned < optimum + 0.02


def test_one_dataset_that_gains_is_not_lost_among_many_that_do_not():
    """The strength is shared in units of evidence, so that a large dataset may leave its group and small ones stay."""
    generator = np.random.default_rng(0)
    small = [drawn(generator, (2.0, 0.2, 0.2), 12, 2) for _ in range(5)]
    large = drawn(generator, (0.2, 2.0, 0.2), 500, 2)
    found = learn_weights([s for s, _ in [*small, large]], [y for _, y in [*small, large]], [OWN] * 6)
    assert found.weights[-1][1] > 0.6
    assert np.mean([w[0] for w in found.weights[:-1]]) > 0.9
    for losses in found.losses:
        assert losses["learned"] <= losses["prior"] + 0.05
    assert found.losses[-1]["learned"] < found.losses[-1]["prior"] - 0.1


def test_too_few_examples_leave_the_prior():
    scores, labels = random_scores(0)
    found = learn_weights([scores[:, :1], scores[:, :0]], [labels[:1], labels[:0]], [OWN, ALIKE])
    np.testing.assert_array_equal(found.weights, [OWN, ALIKE])
    assert found.scales == [found.shared_scale] * 2
    assert found.losses == [None, None]
    assert np.isinf(found.choice.strength)


def test_combination_does_not_depend_on_the_scores_level():
    scores, labels = random_scores(1)
    shifted = scores + np.random.default_rng(0).normal(size=(3, 40, 1)) * 50
    w = np.array([0.2, 0.5, 0.3])
    np.testing.assert_allclose(combine(scores, w), combine(shifted, w), atol=1e-9)
    assert len(labels) == 40


def test_adapters_of_weight_zero_may_hold_anything():
    scores, _ = random_scores(2)
    broken = scores.copy()
    broken[1] = np.nan
    w = np.array([0.4, 0.0, 0.6])
    np.testing.assert_array_equal(combine(scores, w), combine(broken, w))


def random_direction(seed, count=40, signal=0.3):
    generator = np.random.default_rng(seed)
    scores, labels = generator.normal(size=(count, 3)), generator.integers(0, 3, count)
    direction = generator.normal(size=(count, 3)) * 0.5
    direction[np.arange(count), labels] += signal
    return scores, direction, labels


@pytest.mark.parametrize("strength", [0.0, 4.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_step_is_the_lowest_of_a_grid(seed, strength):
    scores, direction, labels = random_direction(seed, signal=0.8)
    h = 1e-5
    slopes = (label_losses(scores + h * direction, labels) - label_losses(scores - h * direction, labels)) / (2 * h)
    pull = strength / len(labels) * np.sqrt((slopes**2).mean())
    grid = np.linspace(0, 8, 8001)
    lowest = grid[np.argmin([label_losses(scores + step * direction, labels).mean() + pull * step for step in grid])]
    assert fit_step_size(scores, direction, labels, strength) == pytest.approx(lowest, abs=2e-3)
    assert fit_step_size(scores, direction, labels, np.inf) == 0


def test_what_a_step_adds_does_not_depend_on_the_direction_s_length():
    scores, direction, labels = random_direction(0, signal=1.0)
    step = fit_step_size(scores, direction, labels, 4.0)
    assert step > 0
    assert fit_step_size(scores, direction * 4, labels, 4.0) == pytest.approx(step / 4, rel=1e-6)


def test_a_step_is_no_longer_than_what_training_says():
    """A direction that rights every validation example would be followed for ever."""
    scores, _, labels = random_direction(0)
    direction = np.eye(3)[labels]
    assert fit_step_size(scores, direction, labels, 0.0) > 10
    assert fit_step_size(scores, direction, labels, 0.0, 1.5) == 1.5
    assert fit_step_size(scores, direction, labels, 0.0, 0.0) == 0
    grid = np.linspace(0, 5, 5001)
    scores, direction, labels = random_direction(1, signal=0.6)
    lowest = grid[np.argmin([label_losses(scores + step * direction, labels).mean() for step in grid])]
    assert best_step(scores, direction, labels) == pytest.approx(lowest, abs=1e-3)
    assert best_step(scores, -direction, labels) == 0


def learned_steps(drawn_directions):
    scores, directions, labels = zip(*drawn_directions, strict=True)
    return learn_step_sizes(scores, directions, labels, [5.0] * len(scores))


def test_boosters_that_do_not_help_held_out_examples_get_no_step():
    harm = learned_steps([(s, -d, y) for s, d, y in (random_direction(seed, signal=1.0) for seed in range(3))])
    assert harm.steps == [0, 0, 0]
    groups = [[random_direction(3 * seed + i, 33, signal=0.0) for i in range(3)] for seed in range(20)]
    noise = [learned_steps(group) for group in groups]
    assert np.mean([max(found.steps) == 0 for found in noise]) >= 0.7
    for found, group in zip(noise, groups, strict=True):
        still = [label_losses(s, y).mean() for s, _, y in group]
        assert all(reached <= before for reached, before in zip(found.losses, still, strict=True))
    help_ = learned_steps([random_direction(seed, 33, signal=0.8) for seed in range(3)])
    assert min(help_.steps) > 0.3
    assert help_.choice.strength < 64


def test_one_that_is_helped_is_boosted_beside_one_that_is_not():
    helped, not_helped = random_direction(0, 60, signal=1.0), random_direction(1, 60, signal=-0.3)
    steps = learned_steps([helped, not_helped]).steps
    assert steps[0] > 0.3
    assert steps[1] == 0


def test_a_score_is_one_sum_over_adapters():
    generator = np.random.default_rng(0)
    names = ["group-0", "group-1", "booster-0", "booster-1", "start"]
    scores = {name: generator.normal(size=(6, 3)) for name in names}
    boosting = {"boosters": {"t": ["booster-0", "booster-1"]}, "step_sizes": {"t": 0.7}}
    ensemble = {"adapters": names[:2], "weights": {"t": [0.4, 0.6], "u": [0.0, 1.0]}, "boosting": boosting}
    want = combine(np.stack([scores["group-0"], scores["group-1"]]), np.array([0.4, 0.6]))
    want += 0.7 * booster_scores(np.stack([scores["booster-0"], scores["booster-1"]]), scores["start"])
    np.testing.assert_allclose(add_up(scores, coefficients(ensemble, "t")), want, atol=1e-12)
    assert coefficients(ensemble, "u") == {"group-1": 1.0}
    scaled = coefficients({**ensemble, "scales": {"t": 0.5}}, "t")
    assert scaled == pytest.approx(coefficients(ensemble, "t") | {"group-0": 0.2, "group-1": 0.3})
    assert scale_of(ensemble, "t") == 1.0


def test_a_start_that_is_weighed_is_also_what_boosters_are_counted_from():
    weights = {"t": [0.4, 0.6], "u": [1.0, 0.0]}
    boosting = {"boosters": {"t": ["booster-0"]}, "step_sizes": {"t": 0.7}}
    ensemble = {"adapters": ["group-0", "start"], "weights": weights, "boosting": boosting}
    assert coefficients(ensemble, "t") == pytest.approx({"group-0": 0.4, "booster-0": 0.7, "start": 0.6 - 0.7})
    assert coefficients(ensemble, "u") == {"group-0": 1.0}


def test_boosters_count_by_their_difference_from_the_start():
    generator = np.random.default_rng(0)
    boosters, start = generator.normal(size=(2, 7, 3)), generator.normal(size=(7, 3))
    added = booster_scores(boosters, start)
    want = sum(log_softmax(b, axis=1) - log_softmax(start, axis=1) for b in boosters)
    np.testing.assert_allclose(added, want, atol=1e-12)
    shifted = booster_scores(boosters + generator.normal(size=(2, 7, 1)), start + 5.0)
    np.testing.assert_allclose(added, shifted, atol=1e-9, err_msg="the level of scores means nothing")
    assert not booster_scores(start[None], start).any()
