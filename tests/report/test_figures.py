import io

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from ray_ensemble.errors import InputError
from ray_ensemble.report import figures, figures_run, write_report, write_search_plot
from ray_ensemble.report.figures import relative_affinity
from ray_ensemble.report.load import load_run
from ray_ensemble.report.theme import DARK, LIGHT, name, render

MAKERS = [
    figures.test_bars,
    figures.affinity_map,
    figures.estimates,
    figures_run.search_plot,
    figures_run.training_curves,
    figures_run.cost_bars,
]


def test_relative_affinity_takes_each_rows_mean_over_partners_off():
    values = np.array([[9.0, 1.0, 3.0], [2.0, 9.0, np.nan], [4.0, 4.0, 9.0]])
    expected = [[np.nan, -1.0, 1.0], [0.0, np.nan, np.nan], [0.0, 0.0, np.nan]]
    np.testing.assert_array_equal(relative_affinity(values), expected)


def test_smoothing_is_the_mean_of_the_last_values():
    values = tuple(np.random.default_rng(0).normal(size=23))
    slow = [np.mean(values[max(0, i - 4) : i + 1]) for i in range(23)]
    assert figures_run.smooth(values, 5) == pytest.approx(slow)
    assert figures_run.smooth(values, 1) == pytest.approx(values)


def test_names_are_never_read_as_mathematics():
    figure = mpl.figure.Figure()
    text = figure.text(0, 0, name(r"$\frac{1}{$ and $x$"))
    mpl.backends.backend_agg.FigureCanvasAgg(figure).draw()  # mathematics that does not parse would raise
    assert text.get_text().count(r"\$") == 4


@pytest.mark.parametrize("make", MAKERS)
def test_every_figure_has_one_sentence_and_draws(run_folder, make):
    drawing = make(load_run(run_folder))
    assert isinstance(drawing, figures.Drawing)
    assert drawing.caption.endswith(".")
    image = Image.open(io.BytesIO(render(drawing.draw, LIGHT)))
    assert image.info.keys() <= {"dpi"}  # no date, no version of matplotlib
    assert image.width <= 1350
    assert len(np.unique(np.asarray(image.convert("L")))) > 10


def test_themes_differ_and_settings_of_the_user_do_not_matter(run_folder):
    drawing = figures_run.cost_bars(load_run(run_folder))
    light = render(drawing.draw, LIGHT)
    assert render(drawing.draw, DARK) != light
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "savefig.bbox": "tight"}):
        assert render(drawing.draw, LIGHT) == light
        assert mpl.rcParams["font.size"] == 30


def test_outlines_are_the_groups(run_folder):
    data = load_run(run_folder)
    seen = []

    def draw(theme):
        figure = figures.affinity_map(data).draw(theme)
        seen.extend((p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in figure.axes[0].patches)
        return figure

    render(draw, LIGHT)
    assert seen == [(-0.5, -0.5, 3, 3), (2.5, 2.5, 1, 1), (3.5, 3.5, 3, 3), (6.5, 6.5, 1, 1)]


def test_names_at_points_do_not_cover_each_other():
    pairs = [(f"task {i}", 0.5 + 0.001 * i, 0.5) for i in range(6)] + [("far", 0.9, 0.9)]
    placed = figures._places(pairs, 0.4, 1.0)
    assert len({offset for offset, _ in placed[:6]}) == 6


def test_without_data_the_reason_is_told(run_folder):
    data = load_run(run_folder)
    for field, make in (("curves", figures_run.training_curves), ("trials", figures_run.search_plot)):
        bare = type(data)(**{**vars(data), field: ()})
        missing = make(bare)
        assert isinstance(missing, figures.Missing)
        assert missing.reason.endswith(".")
    bare = type(data)(**{**vars(data), "metrics": {**data.metrics, "flops": {}, "seconds": {}}})
    assert isinstance(figures_run.cost_bars(bare), figures.Missing)


def test_a_summary_by_m_stands_in_for_trials(run_folder):
    data = load_run(run_folder)
    by_m = [
        {"m": 3, "search_objective": 0.42, "mean": 0.43, "std": 0.01, "standard_error": 0.004},
        {"m": 2, "search_objective": 0.45},
        {"mean": 1.0},
        None,
    ]
    bare = type(data)(**{**vars(data), "trials": (), "partition": {**data.partition, "by_m": by_m}})
    drawing = figures_run.search_plot(bare)
    assert "a mark is one trial" not in drawing.caption
    assert "paired over datasets" in drawing.caption
    seen = []

    def draw(theme):
        figure = drawing.draw(theme)
        seen.extend(line.get_xydata().tolist() for line in figure.axes[0].lines)
        return figure

    render(draw, LIGHT)
    assert [[2.0, 0.45], [3.0, 0.43]] in seen  # the means
    assert [[2.0, 0.45], [3.0, 0.42]] in seen  # the best


def test_the_plot_of_a_search_needs_nothing_that_comes_after_it(run_folder):
    written = write_report(run_folder)
    wanted = (run_folder / "plots" / "search.png").read_bytes()
    for later in ("metrics.json", "ensemble.json", "tasks.json", "affinity.json"):
        (run_folder / later).unlink()
    for path in (run_folder / "plots").iterdir():
        path.unlink()
    assert write_search_plot(run_folder) == written.parent / "plots" / "search.png"
    assert (run_folder / "plots" / "search.png").read_bytes() == wanted
    (run_folder / "search" / "trials.csv").unlink()
    assert write_search_plot(run_folder) is None  # this partition.json has no summary by m either
    (run_folder / "partition.json").unlink()
    with pytest.raises(InputError, match=r"partition\.json"):
        write_search_plot(run_folder)
