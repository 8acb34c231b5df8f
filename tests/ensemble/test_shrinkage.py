"""Cross-fitting: no example is judged by a fit that has seen it, and a strength is only given up for what is no chance."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ray_ensemble.ensemble.shrinkage import choose, cross_fitted, fold_of


@pytest.mark.parametrize("count", [2, 3, 5, 7, 40, 101])
def test_every_example_is_judged_once_by_a_fit_without_it(count):
    def predict(fitted, judged, strength):
        assert set(fitted) | set(judged) == set(range(count))
        assert not set(fitted) & set(judged)
        assert len(fitted)
        return 1000 * strength + np.stack([judged, -judged], axis=1)

    each = np.stack([np.arange(count), -np.arange(count)], axis=1)
    np.testing.assert_array_equal(cross_fitted(count, predict, (2.0, 1.0)), [2000 + each, 1000 + each])
    sizes = np.bincount(fold_of(count))
    assert len(sizes) == min(5, count)
    assert sizes.max() - sizes.min() <= 1


def test_folds_do_not_follow_the_order_of_the_file():
    """Label i mod 5, as in a file that goes through its labels: every fold must still hold several of them."""
    fold = fold_of(50)
    for part in range(5):
        assert len({i % 5 for i in np.flatnonzero(fold == part)}) > 2


def test_nothing_to_judge_by_leaves_all_to_the_strongest():
    for losses in ([], [np.ones((2, 1))]):
        found = choose(losses, (math.inf, 0.0))
        assert (found.strength, found.shares, found.losses) == (math.inf, (1.0, 0.0), ())
        assert found.described() == {"strength": None, "tried": []}


def test_ties_and_noise_go_to_the_strongest_and_plain_gains_do_not():
    generator = np.random.default_rng(0)
    level = generator.random(40)
    ladder = (math.inf, 4.0, 0.0)
    equal = choose([np.stack([level] * 3)], ladder)
    assert equal.strength == math.inf
    np.testing.assert_allclose(equal.shares, 1 / 3)
    noise = generator.normal(size=40)
    slight = np.stack([level, level - 0.05 + noise, level - 0.1 + noise])
    assert choose([slight], ladder).strength == math.inf
    plain = np.stack([level, level - 0.5 + 0.1 * noise, level - 0.5 + 0.1 * noise[::-1]])
    found = choose([plain], ladder)
    assert found.strength == 4.0
    np.testing.assert_allclose(found.losses, plain.mean(axis=1))
    assert found.shares[0] < 0.01
    assert sum(found.shares) == pytest.approx(1)
    assert found.described()["tried"][0] == {
        "strength": None, "loss": pytest.approx(level.mean()), "share": found.shares[0],
    }  # fmt: skip


def test_shares_fall_with_the_distance_in_standard_errors():
    generator = np.random.default_rng(2)
    level, noise = generator.random((3, 20)), generator.normal(size=(3, 20))
    losses = [np.stack([level[i] + 0.3 + noise[i], level[i]]) for i in range(3)]
    apart = [each[0] - each[1] for each in losses]
    z = np.mean([a.mean() for a in apart]) / (math.sqrt(sum(a.var(ddof=1) / 20 for a in apart)) / 3)
    shares = choose(losses, (math.inf, 0.0)).shares
    assert shares[0] / shares[1] == pytest.approx(math.exp(-(z**2) / 2))


def test_datasets_together_see_what_one_cannot():
    """The same small gain in nine datasets is told from chance where one dataset's is not; each dataset counts the same."""
    generator = np.random.default_rng(1)
    ladder = (math.inf, 0.0)
    each = [np.stack([np.zeros(30), -0.15 + generator.normal(size=30)]) for _ in range(40)]
    assert choose(each, ladder).strength == 0.0
    assert np.mean([choose([one], ladder).strength == math.inf for one in each]) > 0.4
    large, small = np.stack([np.zeros(900), np.full(900, 0.1)]), np.stack([np.zeros(9), np.full(9, -0.3)])
    assert choose([large, small], ladder).strength == 0.0
