import io
import json

import pytest
from rich.console import Console

from ray_ensemble.errors import InputError
from ray_ensemble.report import search_summary


def printed(folder):
    stream = io.StringIO()
    Console(file=stream, width=120).print(search_summary(folder))
    return stream.getvalue()


def row(m, best, difference, error):
    return {
        "m": m,
        "trials": 7,
        "search_objective": best,
        "mean": best + 0.01,
        "std": 0.002,
        "worst": best + 0.02,
        "objective": best + 0.03,
        "difference": difference,
        "standard_error": error,
    }


@pytest.fixture
def searched(tmp_path):
    partition = {
        "groups": [["sst2", "a\x1b[2Jb"], ["trec"]],
        "m": 2,
        "objective": 0.45,
        "metric": "loss",
        "price": 0.001,
        "rule": "one_standard_error",
        "by_m": [row(3, 0.41, 0.0, 0.0), row(2, 0.42, 0.01, 0.012)],
        "harmful": [{"task": "trec", "effect": -0.021, "standard_error": 0.004, "partners": 9, "better": 0}],
        "unlearnt": [{"task": "sst2", "gain": -0.012, "standard_error": 0.034}],
    }
    (tmp_path / "partition.json").write_text(json.dumps(partition))
    return tmp_path


def test_it_has_a_row_for_every_m_and_names_groups_and_harm(searched):
    text = printed(searched)
    lines = text.splitlines()
    assert "+ 0.001 an adapter" in lines[0]
    cells = [line.split() for line in lines[2:4]]
    assert cells[0] == ["*2", "7", "0.4200", "0.4300", "0.0020", "0.4500", "+0.0100", "±", "0.0120"]
    assert cells[1][0] == "3"
    assert "chosen by the rule 'one standard error'" in " ".join(text.split())
    assert "group-0: sst2, a [2Jb" in text
    assert "trec harms what trains beside it: −0.0210 ± 0.0040 over 9 partners" in text
    assert "sst2 is not predicted better than by its labels' frequencies: −0.0120 ± 0.0340" in text
    assert "\x1b" not in text
    assert "Plot" not in text


def test_the_plot_is_told_where_it_is(searched):
    (searched / "plots").mkdir()
    (searched / "plots" / "search.png").touch()
    assert str(searched / "plots" / "search.png") in printed(searched).replace("\n", "")


def test_without_a_search_the_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"partition\.json: this partition is missing"):
        search_summary(tmp_path)
