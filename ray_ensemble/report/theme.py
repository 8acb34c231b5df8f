"""Colours of the report in light and dark, and figures that are the same bytes for the same data."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from ray_ensemble.report.facts import plain

DPI = 150
WIDTH = 9.0  # inches of every figure that uses the page's width


@dataclass(frozen=True)
class Theme:
    """One look. `groups` are eight colours that stay apart for the colour-blind; `base`, `joint` and `ours` the models'."""

    surface: str
    ink: str
    muted: str
    grid: str
    base: str
    joint: str
    ours: str
    helps: str
    neutral: str
    hurts: str
    groups: tuple[str, ...]

    def group(self, index: int) -> str:
        """The colour of a group; it repeats after eight."""
        return self.groups[index % len(self.groups)]

    def diverging(self) -> LinearSegmentedColormap:
        """From what hurts over no effect to what helps."""
        return LinearSegmentedColormap.from_list("effect", [self.hurts, self.neutral, self.helps])


LIGHT = Theme(
    surface="#ffffff",
    ink="#1b1b1a",
    muted="#63625e",
    grid="#e4e3df",
    base="#a9a8a3",
    joint="#2a78d6",
    ours="#eb6834",
    helps="#1f6fd0",
    neutral="#f3f2ef",
    hurts="#d4452f",
    groups=("#2a78d6", "#eb6834", "#1baf7a", "#eda100", "#e87ba4", "#008300", "#4a3aa7", "#e34948"),
)
DARK = Theme(
    surface="#1c1c1b",
    ink="#f1f0ec",
    muted="#b0afa9",
    grid="#363633",
    base="#7d7c77",
    joint="#3987e5",
    ours="#d95926",
    helps="#4a96ef",
    neutral="#2b2b29",
    hurts="#e0604c",
    groups=("#3987e5", "#d95926", "#199e70", "#c98500", "#d55181", "#008300", "#9085e9", "#e66767"),
)


def name(text: object, width: int = 26) -> str:
    """A name from data as matplotlib prints it: on one line, cut to `width`, and never read as mathematics."""
    return plain(text, width).replace("$", r"\$")


def render(draw: Callable[[Theme], Figure], theme: Theme) -> bytes:
    """Draw in one theme and return the PNG; same bytes for the same figure, whatever the user's matplotlib settings."""
    settings = {
        "font.family": ["DejaVu Sans"],
        "font.size": 9.5,
        "figure.dpi": DPI,
        "figure.facecolor": theme.surface,
        "axes.facecolor": theme.surface,
        "axes.edgecolor": theme.grid,
        "axes.labelcolor": theme.muted,
        "axes.titlecolor": theme.ink,
        "axes.titlesize": 10.5,
        "axes.titlelocation": "left",
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.unicode_minus": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "text.color": theme.ink,
        "text.usetex": False,
        "xtick.color": theme.muted,
        "ytick.color": theme.ink,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "legend.frameon": False,
        "legend.labelcolor": theme.ink,
        "lines.linewidth": 1.8,
        "lines.solid_capstyle": "round",
    }
    with mpl.rc_context(), warnings.catch_warnings():
        # A label in a script that the font lacks is drawn as boxes; the page has it in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        mpl.rcParams.update({key: value for key, value in mpl.rcParamsDefault.items() if not key.startswith("backend")})
        mpl.rcParams.update(settings)
        figure = draw(theme)
        stream = io.BytesIO()
        # Straight to the canvas: `savefig` would draw everything twice. No metadata, or the version would be in it.
        FigureCanvasAgg(figure).print_png(stream, metadata={"Software": None})
    return stream.getvalue()
