"""One budget for every partition: optimiser steps that add up to the same total however tasks are grouped."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ray_ensemble.config import TrainingConfig
from ray_ensemble.errors import InputError


def task_steps(examples: Sequence[int], training: TrainingConfig, more: int = 0) -> tuple[int, ...]:
    """Each task's share of the steps of all tasks together; a group's budget is the sum over its members.

    All tasks together get ⌈epochs · examples / batch size⌉ steps, without the floor `training.min_steps`, and `more` on top.
    A task's share is in proportion to its training examples, in whole steps by largest remainder, of equals the first task's.
    Since shares are of tasks and not of groups, every partition gets the same total, and a group the same budget in every
    partition.

    Args:
        examples: training examples of each task.
        training: epochs and batch size.
        more: steps that are shared out besides.

    Raises:
        InputError: a task would get no step.
    """
    total = math.ceil(training.epochs * sum(examples) / training.batch_size) + more
    exact = [total * count / sum(examples) for count in examples]
    shares = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda task: (shares[task] - exact[task], task))
    for task in by_remainder[: total - sum(shares)]:
        shares[task] += 1
    if min(shares) < 1:
        raise InputError(
            f"training.epochs: {total} steps for {len(shares)} tasks leave one with none "
            f"({min(examples)} of {sum(examples)} examples); raise it, or lower training.batch_size"
        )
    return tuple(shares)
