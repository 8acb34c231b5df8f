"""Every partition there is, the slow reference of the searches."""

from __future__ import annotations

from collections.abc import Iterator

from ray_ensemble.grouping.partitions import Partition, from_labels


def all_partitions(n: int, m: int) -> Iterator[Partition]:
    """Every partition of n tasks into m groups, by restricted growth strings."""

    def grow(labels: list[int]) -> Iterator[Partition]:
        if len(labels) == n:
            if max(labels) + 1 == m:
                yield from_labels(labels)
            return
        for label in range(min(max(labels) + 2, m)):
            yield from grow([*labels, label])

    yield from grow([0])
