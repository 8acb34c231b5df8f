"""Which adapters share a process: small ones are put together where that makes nobody wait longer. No Ray here."""

from __future__ import annotations

import math
from collections.abc import Sequence


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
        From 1 to `most` for each; no more than `held` together, unless there are more jobs.
    """
    total, idle = sum(steps), max(0, held - len(steps))
    shares = [held * each / total for each in steps]
    workers = [1] * len(steps)
    # One after another to the job that has least of its share, so that what rounding leaves over is used too.
    for _ in range(idle):
        open_jobs = [job for job in range(len(steps)) if workers[job] < most]
        if not open_jobs:
            break
        workers[min(open_jobs, key=lambda job: (workers[job] / shares[job], job))] += 1
    return workers
