import json
import math

import numpy as np
import pytest

from ray_ensemble.errors import InputError
from ray_ensemble.report.load import load_run


def change(path, edit):
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def test_tasks_and_affinity_follow_the_groups(run_folder):
    data = load_run(run_folder)
    assert data.order == ("sst2", "cr", "mr", "trec", "hate", "irony", "offensive", "stance")
    assert list(data.tasks) == list(data.order)
    stored = json.loads((run_folder / "affinity.json").read_text())
    row, column = stored["tasks"].index("trec"), stored["tasks"].index("hate")
    assert data.affinity[3, 4] == stored["values"][row][column]
    assert data.affinity_errors is not None
    assert math.isnan(data.affinity_errors[2, 2])
    assert [data.group_of(task) for task in data.order] == [0, 0, 0, 1, 2, 2, 2, 3]


@pytest.mark.parametrize(
    "name", ["config.yaml", "tasks.json", "affinity.json", "partition.json", "ensemble.json", "metrics.json"]
)
def test_a_missing_file_is_named(run_folder, name):
    (run_folder / name).unlink()
    with pytest.raises(InputError, match=str(run_folder / name)):
        load_run(run_folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.json", "{", "cannot be read as JSON"),
        ("metrics.json", "[]", "no 'tasks'"),
        ("metrics.json", '{"tasks": {}}', "no 'mean'"),
        ("metrics.json", '{"tasks": {}, "mean": {}}', "lacks task 'sst2'"),
        ("partition.json", '{"groups": []}', "no groups"),
        ("partition.json", '{"groups": [["sst2"]]}', "has task 'cr'"),
        ("affinity.json", '{"tasks": [], "values": []}', "lacks task 'sst2'"),
        ("ensemble.json", "{}", "no 'adapters'"),
    ],
)
def test_damaged_and_mixed_files_are_refused_by_name(run_folder, name, text, message):
    (run_folder / name).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_run(run_folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [[[1.0]], [["x"] * 8] * 8, 3 * [[0.0]], [[1.0], [1.0, 2.0]]])
def test_an_affinity_that_is_no_matrix_is_refused(run_folder, values):
    change(run_folder / "affinity.json", lambda data: data.update(values=values))
    with pytest.raises(InputError, match=r"affinity\.json: 'values'"):
        load_run(run_folder)


def test_unknown_affinities_are_nan(run_folder):
    change(run_folder / "affinity.json", lambda data: data["values"][0].__setitem__(1, None))
    assert np.isnan(load_run(run_folder).affinity).sum() == 1


def test_trials_without_objective_are_counted_and_left_out(run_folder):
    with (run_folder / "search" / "trials.csv").open("a") as stream:
        stream.write("2,99,sdp,,0.1\n2,98,sdp,nan,0.1\nx,97,sdp,0.4,0.1\n")
    data = load_run(run_folder)
    assert len(data.trials) == 32
    assert data.notes["search"] == ("3 of 35 rows of search/trials.csv have no objective.",)


def test_a_repeated_step_counts_as_it_went_last_and_torn_lines_are_told(run_folder):
    log = run_folder / "adapters" / "group-1" / "train.jsonl"
    log.write_text('{"step": 0, "loss": 3.0}\n{"step": 1, "loss": 2.0}\n{"step": 1, "lo\n{"step": 1, "loss": 1.0}\n')
    data = load_run(run_folder)
    curve = next(curve for curve in data.curves if curve.name == "group-1")
    assert (curve.steps, curve.losses) == ((0, 1), (3.0, 1.0))
    assert data.notes["training"] == ("1 of 4 lines of adapters/group-1/train.jsonl could not be read.",)


def test_optional_files_may_be_absent_and_are_told(run_folder):
    for name in ("plan.json", "search/trials.csv", "baselines/qlora_all/train.jsonl"):
        (run_folder / name).unlink()
    data = load_run(run_folder)
    assert data.plan == {}
    assert data.trials == ()
    assert "no search/trials.csv" in data.notes["search"][0]
    assert "baselines/qlora_all/train.jsonl" in data.notes["training"][0]
    assert data.validation is None
