"""Splits for sources that have none, and samples of splits: pure functions of the examples and a seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from ray_ensemble.tasks.task import Example, Split

T = TypeVar("T")

_BRIDGE, _PARITY = 2.0, 3.6  # in standard deviations: exceeded by chance in 7 and 3 of 10,000 orders
TRAIN_CAP, VALIDATION_CAP, TEST_CAP = 2000, 500, 1000


def drop_repeats(examples: Sequence[Example], fields: Sequence[str]) -> list[Example]:
    """Keep the first of the examples that agree in `fields`, or none of them where their labels differ.

    Fields are compared without case and with every run of blanks as one.
    """
    keys = [tuple(" ".join(example.fields[name].casefold().split()) for name in fields) for example in examples]
    labels: dict[tuple[str, ...], set[int]] = {}
    for key, example in zip(keys, examples, strict=True):
        labels.setdefault(key, set()).add(example.label)
    first = dict(zip(reversed(keys), reversed(range(len(keys))), strict=True))
    return [
        example
        for place, (key, example) in enumerate(zip(keys, examples, strict=True))
        if len(labels[key]) == 1 and first[key] == place
    ]


def draw_splits(
    examples: Sequence[Example], seed: int, wanted: Sequence[Split], train_cap: int | None = None
) -> dict[Split, tuple[Example, ...]]:
    """Shuffle with `seed`, then cut `wanted` splits and the train split, each with the labels' shares of the whole.

    Validation gets a fifth of the examples and at most 500, test three tenths and at most 1,000 (nothing if not in
    `wanted`), train the rest and at most `train_cap`.
    """
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(examples))
    shuffled = [examples[i] for i in order]
    total = Counter(example.label for example in shuffled)
    seen: Counter[int] = Counter()
    places = []
    for example in shuffled:
        places.append((seen[example.label] + 0.5) / total[example.label])
        seen[example.label] += 1
    # Every label is spread evenly over [0, 1), so any stretch of this order has the labels' shares to within one.
    spread = sorted(range(len(shuffled)), key=lambda i: (places[i], i))
    sizes: dict[Split, int] = {
        "validation": min(len(spread) // 5, VALIDATION_CAP) if "validation" in wanted else 0,
        "test": min(len(spread) * 3 // 10, TEST_CAP) if "test" in wanted else 0,
    }
    splits: dict[Split, tuple[Example, ...]] = {}
    start = 0
    for split, size in sizes.items():
        splits[split] = tuple(shuffled[i] for i in sorted(spread[start : start + size]))
        start += size
    stop = len(spread) if train_cap is None else start + train_cap
    train = tuple(shuffled[i] for i in sorted(spread[start:stop]))
    return {"train": train, **{split: splits[split] for split in wanted}}


def without_order(examples: Sequence[Example]) -> tuple[Example, ...]:
    """The examples as they are, or shuffled with seed 0 where their order tells their labels.

    The first of a split stand for it (`gradients.max_examples`), and every other one of its validation examples for the half that
    the search looks at: a file that is sorted by label, or alternates between labels, would give either one label. Of orders that
    chance gives one in some hundreds is shuffled too, which does no harm.
    """
    if not _order_tells([example.label for example in examples]):
        return tuple(examples)
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(examples))
    return tuple(examples[i] for i in order.tolist())


def _order_tells(labels: Sequence[int]) -> bool:
    """Whether a label is too frequent in some first part, or at even places, for a random order.

    Counts of a label in first parts of a random order are a bridge whose greatest distance from the straight line exceeds
    x·√(n·p(1 − p)) with probability 2·exp(−2x²) (Kolmogorov 1933). The difference between its counts at even and odd places is
    about normal, with that deviation.
    """
    found = np.asarray(labels)
    count = len(found)
    for label in np.unique(found):
        there = (found == label).astype(np.float64)
        deviation = np.sqrt(count * there.mean() * (1 - there.mean()))
        bridge = np.abs(np.cumsum(there) - np.arange(1, count + 1) * there.mean()).max()
        parity = abs(there[::2].sum() - there[1::2].sum() - (count % 2) * there.mean())
        if bridge > _BRIDGE * deviation or parity > _PARITY * deviation:
            return True
    return False


def sample(examples: Sequence[T], size: int | None, seed: int = 0) -> tuple[T, ...]:
    """`size` random examples (all where `size` is None) in their order; a smaller sample is part of a larger one."""
    if size is None or size >= len(examples):
        return tuple(examples)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(examples))
    return tuple(examples[i] for i in sorted(order[:size].tolist()))
