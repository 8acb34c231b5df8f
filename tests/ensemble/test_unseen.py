"""Weights of a dataset that was not in the run."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ray_ensemble.ensemble.unseen import weights_of_examples, weights_of_similarity
from ray_ensemble.ensemble.weights import fit_weights


def drawn(generator, skills, count, classes=2):
    labels = generator.integers(0, classes, count)
    scores = generator.normal(size=(len(skills), count, classes))
    scores[:, np.arange(count), labels] += np.array(skills)[:, None]
    return scores, labels


def test_few_examples_move_weight_only_as_far_as_they_speak():
    generator = np.random.default_rng(0)
    many = weights_of_examples(*drawn(generator, (0.2, 3.0, 0.2), 200))
    assert many.weights[0][1] > 0.6
    assert many.losses[0]["learned"] < many.losses[0]["uniform"] == many.losses[0]["prior"]
    alike, distances = np.full(3, 1 / 3), []
    for _ in range(10):
        scores, labels = drawn(generator, (1.0, 1.0, 1.0), 6)
        bare = fit_weights(scores, labels, alike, 0.1)
        fits = weights_of_examples(scores, labels).weights[0], bare / bare.sum()
        distances.append([np.abs(w - alike).sum() for w in fits])
    learned, unshrunk = np.mean(distances, axis=0)
    assert learned < 0.6 * unshrunk


def test_without_many_labels_the_scale_is_that_of_the_run():
    generator = np.random.default_rng(1)
    scores, labels = drawn(generator, (1.0, 1.0, 1.0), 400)
    for expected in (0.2, 3.0):
        few = weights_of_examples(scores[:, :1], labels[:1], expected)
        assert few.scales[0] == pytest.approx(expected, rel=0.7)
        many = weights_of_examples(scores, labels, expected)
        assert many.shared_scale == pytest.approx(weights_of_examples(scores, labels).shared_scale, rel=0.2)


def planted(generator, told, count=60):
    """Eight datasets of four kinds, two of each in two groups; a kind's two groups serve it, if states tell the kinds."""
    kinds, own = [i // 2 for i in range(8)], [(i // 2 + 2 * (i % 2)) % 4 for i in range(8)]
    centres = generator.normal(size=(4, 16)) * (3.0 if told else 0.0)
    states = np.stack([centres[kind] + 0.3 * generator.normal(size=16) for kind in kinds])
    serving = [[g in (kind % 4, (kind + 2) % 4) for g in range(4)] for kind in kinds]
    weights = np.array([np.array(row) / 2 for row in serving])
    data = [drawn(generator, [2.5 if good else 0.0 for good in row], count) for row in serving]
    return centres, states, weights, [[g] for g in own], [s for s, _ in data], [y for _, y in data]


def test_similar_datasets_lend_their_weights():
    centres, states, *rest = planted(np.random.default_rng(0), told=True)
    found = weights_of_similarity(centres[1], states, *rest)
    assert math.isfinite(found.choice.strength)
    assert found.shares[2] + found.shares[3] > 0.5
    assert found.weights.sum() == pytest.approx(1)
    assert found.weights[1] + found.weights[3] > 0.6
    assert np.argsort(found.cosines)[-2:].tolist() in ([2, 3], [3, 2])


def test_where_states_tell_nothing_all_datasets_count_the_same():
    chosen = []
    for seed in range(6):
        _, states, weights, *rest = planted(np.random.default_rng(seed), told=False)
        found = weights_of_similarity(states[0] + 0.1, states, weights, *rest)
        chosen.append(math.isinf(found.choice.strength))
        if chosen[-1]:
            np.testing.assert_allclose(found.weights, weights.mean(axis=0))
    assert np.mean(chosen) >= 0.5


def test_an_adapter_that_all_were_trained_on_says_nothing_of_a_dataset_that_none_was():
    """A start that knows the run's datasets by heart would make every temperature look alike."""
    _, states, weights, own, scores, labels = planted(np.random.default_rng(0), told=True)
    plain = weights_of_similarity(states[0], states, weights, own, scores, labels)
    start = [10.0 * (np.arange(2) == np.array(right)[:, None]) for right in labels]
    with_start = weights_of_similarity(
        states[0], states, np.column_stack([0.5 * weights, np.full(8, 0.5)]), [[*seen, 4] for seen in own],
        [np.concatenate([s, each[None]]) for s, each in zip(scores, start, strict=True)], labels,
    )  # fmt: skip
    assert with_start.choice.strength == plain.choice.strength
    np.testing.assert_allclose(with_start.choice.losses, plain.choice.losses)
    np.testing.assert_allclose(with_start.weights, [*(0.5 * plain.weights), 0.5])


@pytest.mark.parametrize("datasets", [1, 2])
def test_a_run_of_one_group_or_one_dataset(datasets):
    generator = np.random.default_rng(0)
    states, weights = generator.normal(size=(datasets, 4)), np.ones((datasets, 1))
    data = [drawn(generator, (1.0,), 9) for _ in range(datasets)]
    found = weights_of_similarity(
        states[0], states, weights, [[0]] * datasets, [s for s, _ in data], [y for _, y in data]
    )
    np.testing.assert_allclose(found.weights, [1.0])
    assert math.isinf(found.choice.strength)
