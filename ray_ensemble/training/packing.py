"""Which adapters share a process: small ones are put together where that makes nobody wait longer. No Ray here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate


def packs(sizes: Sequence[int], most: int, at_once: int) -> list[list[int]]:
    """Put jobs into packs of at most `most`, biggest first, so that all packs side by side end no later than they must.

    No pack is larger than the largest job, or than an even share of everything over the packs that run at once (first-fit
    decreasing, the rule for bins of that size).

    Args:
        sizes: what each job costs, such as its rows.
        most: jobs in a pack.
        at_once: packs that fit on the cluster side by side.

    Returns:
        Places in `sizes` for each pack, largest pack first; those of a pack in falling order of size.
    """
    if not sizes:
        return []
    room = max(*sizes, math.ceil(sum(sizes) / at_once))
    found: list[list[int]] = []
    for place in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        for pack in found:
            if len(pack) < most and sum(sizes[i] for i in pack) + sizes[place] <= room:
                pack.append(place)
                break
        else:
            found.append([place])
    return sorted(found, key=lambda pack: -sum(sizes[i] for i in pack))


def shared_workers(steps: Sequence[int], held: int, most: int) -> list[int]:
    """Workers of jobs of so many steps that share what a cluster holds, in proportion, so that all end at about the same time.

    The baseline on everything has the steps of all groups together: by one worker it takes as long as they do in turn.

    Args:
        steps: of each job.
        held: workers that the cluster holds at once.
        most: workers that one job may have at most.

    Returns:
        From 1 to `most` for each. With many small jobs they are more than `held`, and `side_by_side` tells how many may start.
    """
    shares = [held * each / sum(steps) for each in steps]
    workers = [max(1, min(most, int(share))) for share in shares]
    # What rounding leaves over goes to whoever has least of its share.
    for _ in range(held - sum(workers)):
        lacking = [job for job in range(len(steps)) if workers[job] < most]
        if not lacking:
            break
        workers[min(lacking, key=lambda job: (workers[job] / shares[job], job))] += 1
    return workers


def side_by_side(workers: Sequence[int], held: int) -> int:
    """How many jobs of so many workers may run at once, whichever they are, where the cluster holds `held`; one at least."""
    sums = accumulate(sorted(workers, reverse=True))
    return max(1, sum(total <= held for total in sums))
