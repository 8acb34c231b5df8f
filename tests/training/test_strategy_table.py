"""The table of what works in docs/training.md, tried."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from crew import Crew, Trained, Training
from pydantic import ValidationError
from test_parallel import CONFIG, STRATEGIES, initial, needs_deepspeed, of, tasks  # noqa: F401 (fixtures)

DOCS = Path(__file__).parents[2] / "docs" / "training.md"
COLUMNS = ("1 worker", "1, `offload`", "2 workers", "2, `offload`", "holds")


def table() -> dict[tuple[str, str], dict[str, str]]:
    """Cells of the table by (strategy, quantization) and column."""
    lines = DOCS.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| `strategy` | `model.quantization` |"))
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[start:]]
    header = [cell.strip() for cell in cells[0]]
    rows = {}
    for row in cells[2:]:
        if len(row) != len(header):
            break
        rows[row[0].strip("` "), row[1].strip("` ")] = dict(zip(header[2:], row[2:], strict=True))
    return rows


def test_the_table_has_every_combination():
    found = table()
    assert set(found) == {(strategy, quantization) for strategy in STRATEGIES for quantization in ("none", "nf4")}
    assert all(tuple(row) == COLUMNS for row in found.values())


@pytest.fixture(scope="module")
def crews() -> Iterator[dict[int, Crew]]:
    with Crew(1) as one, Crew(2) as two:
        yield {1: one, 2: two}


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_what_the_table_says_is_what_happens(quantization, tiny_model, initial, tasks, crews):  # noqa: F811
    wanted: list[float] = []
    whole = 0
    for strategy in STRATEGIES:
        row = {}
        for count, crew in crews.items():
            for offload in (False, True):
                column = COLUMNS[2 * (count - 1) + offload]
                try:
                    config = of(strategy, count, offload=offload)
                except ValidationError:
                    row[column] = "refused"
                    continue
                said = crew.train(Training(tiny_model, initial, tasks, config, steps=4, quantization=quantization))
                losses = [line["loss"] for line in said[0].rows]
                wanted = wanted or losses
                row[column] = outcome(said, wanted)
                if count == 2 and not offload:
                    whole = whole or said[0].held
                    shares = [one.held / whole for one in said]
                    row["holds"] = "all" if min(shares) == 1 else "half" if max(shares) < 0.52 else f"{shares}"
        assert row == table()[strategy, quantization], strategy
    assert CONFIG.early_stop  # validation passes are tried, too


def outcome(said: list[Trained], wanted: list[float]) -> str:
    if any(one.error for one in said):
        return "; ".join(one.error for one in said)
    losses = [line["loss"] for line in said[0].rows]
    return "works" if losses == pytest.approx(wanted, rel=1e-3) else f"other losses: {losses}, not {wanted}"
