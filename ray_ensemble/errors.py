"""The two ways in which a run ends badly; the command line turns them into exit codes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """Wrong input or use: what was wrong, where, and what to do, in one line. Exit code 2."""


class RunError(Exception):
    """The input was right and the run failed or ended in part. Exit code 1."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known word nearest to `word`, or `""` where none is near."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""
