"""The router: right where datasets differ, at chance where they do not, and the same after it was written and read."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_softmax

from ray_ensemble.ensemble.router import Router, fit_router, mix, shares
from ray_ensemble.errors import InputError


def clouds(distance, datasets=3, sizes=(60, 20, 40), seed=0, dim=12):
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(datasets, dim)) * distance
    return {f"t{i}": centres[i] + generator.normal(size=(sizes[i], dim)) for i in range(datasets)}


@pytest.mark.parametrize("datasets", [1, 2, 3])
def test_datasets_that_differ_are_told_apart(datasets):
    router = fit_router(clouds(2.0, datasets), clouds(2.0, datasets, seed=1))
    for place, states in enumerate(clouds(2.0, datasets, seed=2).values()):
        probabilities = router.probabilities(states)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1)
        assert np.mean(probabilities.argmax(axis=1) == place) > 0.95


def test_datasets_that_do_not_differ_get_even_odds_whatever_their_sizes():
    router = fit_router(clouds(0.0), clouds(0.0, seed=1))
    found = np.concatenate([router.probabilities(states) for states in clouds(0.0, seed=2).values()])
    np.testing.assert_allclose(found.mean(axis=0), 1 / 3, atol=0.1)
    assert found.max() < 0.6, "the penalty is as strong as held-out inputs ask for"


def test_it_survives_a_file(tmp_path):
    router = fit_router(clouds(1.0), clouds(1.0, seed=1))
    states = clouds(1.0, seed=2)["t1"]
    router.save(tmp_path / "router")
    again = Router.load(tmp_path / "router")
    assert (again.tasks, again.mixture) == (router.tasks, True)
    np.testing.assert_allclose(again.probabilities(states), router.probabilities(states), atol=1e-4)
    weights = tmp_path / "router" / "router.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(InputError, match=r"router\.safetensors"):
        Router.load(tmp_path / "router")


def test_shares_are_probabilities_or_one_dataset():
    probabilities = np.array([[0.7, 0.295, 0.005], [0.1, 0.1, 0.8]])
    np.testing.assert_allclose(shares(probabilities, True), [[0.7 / 0.995, 0.295 / 0.995, 0], [0.1, 0.1, 0.8]])
    np.testing.assert_array_equal(shares(probabilities, False), [[1, 0, 0], [0, 0, 1]])
    many = np.full((2, 400), 1 / 400)
    np.testing.assert_allclose(shares(many, True).sum(axis=1), 1)


def test_each_input_is_scored_by_its_own_coefficients():
    generator = np.random.default_rng(0)
    scores, parts = generator.normal(size=(3, 5, 4)), generator.random((5, 3))
    parts[0, 1] = parts[3, 2] = 0.0
    want = [sum(parts[n, c] * log_softmax(scores[c, n]) for c in range(3)) for n in range(5)]
    spoiled = scores.copy()
    spoiled[1, 0] = spoiled[2, 3] = np.nan
    np.testing.assert_allclose(mix(spoiled, parts), want)
