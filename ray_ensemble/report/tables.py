"""The one look of tables on the terminal."""

from __future__ import annotations

from rich.table import Table


def text_table(title: str, caption: str, gap: int = 2) -> Table:
    """A table without lines, title and caption at the left, columns `gap` blanks apart."""
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        box=None,
        padding=(0, gap, 0, 0),
        pad_edge=False,
    )
