"""Random partitions, and groups by a similarity."""

from __future__ import annotations

import numpy as np
import pytest
from set_partitions import all_partitions

from ray_ensemble.errors import InputError
from ray_ensemble.grouping.baselines import group_by_similarity, random_partitions
from ray_ensemble.grouping.partitions import canonical, to_labels


@pytest.mark.parametrize("method", ["sdp", "spectral"])
def test_blocks_of_a_similarity_are_its_groups(method):
    planted = canonical([(0, 3, 6), (1, 4, 7), (2, 5)])
    labels = np.array(to_labels(planted))
    generator = np.random.default_rng(0)
    noise = generator.normal(scale=0.1, size=(8, 8))
    similarity = np.where(labels[:, None] == labels[None, :], 0.6, -0.3) + noise + noise.T
    before = similarity.copy()
    assert group_by_similarity(similarity, 3, method, 0) == planted
    assert np.array_equal(similarity, before)
    np.fill_diagonal(similarity, 1.0)
    assert group_by_similarity(similarity, 3, method, 0) == planted


def test_many_tasks_are_grouped_without_the_relaxation():
    labels = np.arange(130) % 2
    similarity = np.where(labels[:, None] == labels[None, :], 0.5, -0.5)
    assert group_by_similarity(similarity, 2, "sdp", 0) == canonical([range(0, 130, 2), range(1, 130, 2)])


def test_what_is_no_similarity_is_refused():
    with pytest.raises(ValueError, match="square"):
        group_by_similarity(np.ones((2, 3)), 2, "sdp", 0)
    with pytest.raises(InputError, match="more groups than tasks"):
        group_by_similarity(np.eye(2), 3, "spectral", 0)


def test_random_partitions_are_distinct_and_repeatable():
    found = random_partitions(10, 3, 20, seed=4)
    assert len(set(found)) == 20
    assert all(len(p) == 3 and sorted(t for g in p for t in g) == list(range(10)) for p in found)
    assert random_partitions(10, 3, 5, seed=4) == found[:5]
    assert random_partitions(10, 3, 5, seed=5) != found[:5]
    assert random_partitions(10, 3, 0, seed=4) == []


def test_no_more_random_partitions_than_there_are():
    assert set(random_partitions(4, 2, 20, seed=0)) == set(all_partitions(4, 2))
    assert random_partitions(3, 1, 5, seed=0) == [((0, 1, 2),)]
