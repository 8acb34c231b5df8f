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
