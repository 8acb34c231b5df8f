"""One budget for every partition."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ensemble.config import TrainingConfig
from ray_ensemble.errors import InputError
from ray_ensemble.training import task_steps


@settings(deadline=None)
@given(
    examples=st.lists(st.integers(20, 400), min_size=1, max_size=12),
    epochs=st.integers(1, 3),
    batch=st.integers(1, 8),
)
def test_shares_add_up_and_are_within_a_step_of_proportional(examples, epochs, batch):
    training = TrainingConfig(epochs=epochs, batch_size=batch, min_steps=500)
    found = task_steps(examples, training)
    total = math.ceil(epochs * sum(examples) / batch)
    assert sum(found) == total
    assert all(abs(share - total * count / sum(examples)) < 1 for share, count in zip(found, examples, strict=True))


def test_even_tasks_have_even_shares_whatever_the_floor():
    assert task_steps([160] * 10, TrainingConfig(epochs=3, min_steps=100, batch_size=8)) == (60,) * 10


def test_what_is_left_over_goes_to_the_largest_remainders():
    training = TrainingConfig(epochs=1, batch_size=10, min_steps=0)
    assert task_steps([26, 37, 37], training) == (2, 4, 4)
    assert task_steps([25, 25, 25], training) == (3, 3, 2)


def test_a_task_without_a_step_is_refused():
    with pytest.raises(InputError, match=r"training\.epochs: 13 steps for 2 tasks leave one with none \(1 of 101"):
        task_steps([100, 1], TrainingConfig(epochs=1, batch_size=8))


def test_more_steps_are_shared_out_alike():
    training = TrainingConfig(epochs=1, batch_size=4)
    assert task_steps([8, 12, 16], training) == (2, 3, 4)
    assert task_steps([8, 12, 16], training, more=9) == (4, 6, 8)
