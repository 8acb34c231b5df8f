"""Which examples a step trains on: functions of (seed, step), so that a resumed run needs no sampler's state.

The first-order estimate weighs examples as the sampler draws them (`estimator.budget.sampler_weights`): a new choice here
needs its weights there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ray_ensemble.config import Sampling

Indices = NDArray[np.int64]


def draw(step: int, sizes: Sequence[int], batch_size: int, seed: int, sampling: Sampling) -> Indices:
    """Examples of one step of a group, as indices (batch_size,) into the members' examples in turn.

    Args:
        step: counted from 0.
        sizes: number of examples of each member.
        batch_size: examples a step.
        seed: of the order.
        sampling: `examples` draws every example of the group equally often, so that large members get more of the steps;
            `tasks` draws every member equally often, and every example of a member.
    """
    if sampling == "examples":
        return sample_batch(step, sum(sizes), batch_size, seed)
    return sample_tasks(step, sizes, batch_size, seed)


def sample_batch(step: int, examples: int, batch_size: int, seed: int) -> Indices:
    """Indices (batch_size,) of the examples of one step.

    The sampler goes through all examples in a fresh random order each epoch and lets batches straddle epochs, so every
    example is drawn equally often: the estimate weighs examples in the same way (DESIGN section 2.3).
    """
    indices = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, examples)
        indices.append(_order(examples, seed, epoch)[place])
    return np.array(indices, dtype=np.int64)


def sample_tasks(step: int, sizes: Sequence[int], batch_size: int, seed: int) -> Indices:
    """Indices (batch_size,) of one step into the examples of all tasks in turn, task-balanced.

    Draws come in rounds: each round draws every task once, in a fresh random order, and each task goes through its own
    examples in a fresh random order each of its epochs. So after whole rounds all tasks have been drawn equally often, at any
    time within one draw of each other, and the same holds for the examples of a task.
    """
    firsts = np.cumsum([0, *sizes[:-1]])
    indices = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        turn, place = divmod(position, len(sizes))
        task = int(_order(len(sizes), seed, turn, 1)[place])
        epoch, within = divmod(turn, sizes[task])
        indices.append(firsts[task] + _order(sizes[task], seed, epoch, 2, task)[within])
    return np.array(indices, dtype=np.int64)


@lru_cache(maxsize=64)
def _order(count: int, *entropy: int) -> Indices:
    """A random order of `count` things; the cache spares a step the permutation of all examples for each one it draws."""
    return np.random.Generator(np.random.PCG64(entropy)).permutation(count)
