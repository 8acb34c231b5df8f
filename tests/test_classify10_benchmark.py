"""`benchmarks/classify10.py`: arms of equal budgets, in pieces, resumed, and paired over examples and seeds."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tiny import write_job, write_task

TASKS = ("contrary", "films", "phones")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        import classify10
    finally:
        sys.path.remove(folder)
    return classify10


@pytest.fixture(scope="module")
def arms(benchmark) -> ModuleType:
    return sys.modules["classify10_arms"]


@pytest.fixture(scope="module")
def job(tiny_model, tmp_path_factory) -> Path:
    """Three tasks of 8, 12 and 16 training examples: 9 steps after 4 of a common start."""
    folder = tmp_path_factory.mktemp("classify10")
    for number, name in enumerate(TASKS):
        write_task(folder / "tasks" / name, flip=name == "contrary", seed=number, train=8 + 4 * number)
    return write_job(
        folder,
        tiny_model,
        folder / "tasks",
        gradients={"dim": 32, "replicas": 1, "start": "meta", "meta_steps": 4},
        estimator={"subsets": 3, "subset_size": 2},
        search={"groups": [2], "trials": 2},
        # One Ray Train run a unit. The floor of 16 steps must not count.
        training={
            "epochs": 1,
            "min_steps": 16,
            "batch_size": 4,
            "learning_rate": 5e-3,
            "pack": 8,
            "concurrency": 1,
        },
    )


# Pieces -----------------------------------------------------------------------------------------------------------------


def test_arms_bring_what_they_need_and_come_after_it(benchmark, arms):
    assert benchmark.with_needs(["qlora_longer"]) == ["qlora_all", "ours", "boosted", "qlora_longer"]
    assert benchmark.with_needs(["uniform"]) == ["per_dataset", "uniform"]
    assert benchmark.with_needs(list(arms.ARMS)) == list(arms.ARMS)
    found = benchmark.pieces(list(arms.ARMS), range(3))
    assert len(found) == len(set(found))
    for place, piece in enumerate(found):
        before = found[:place]
        if piece.kind in ("train", "result"):
            for need in arms.ARMS[piece.arm].needs:
                wanted = {
                    "search": benchmark.Piece("search", seed=piece.seed),
                    "hidden_states": benchmark.Piece("hidden_states"),
                }.get(need, benchmark.Piece("result", need, piece.seed))
                assert wanted in before, f"{piece} before {wanted}"
        if piece.kind == "result" and arms.ARMS[piece.arm].works:
            assert benchmark.Piece("train", piece.arm, piece.seed) in before


def test_an_arm_is_done_with_all_seeds_before_the_next(benchmark):
    told = [str(piece) for piece in benchmark.pieces(["qlora_all", "ours"], range(2))]
    assert told == [
        "gradients",
        "search, seed 0",
        "search, seed 1",
        "training of qlora_all, seed 0",
        "training of qlora_all, seed 1",
        "result of qlora_all, seed 0",
        "result of qlora_all, seed 1",
        "training of ours, seed 0",
        "training of ours, seed 1",
        "result of ours, seed 0",
        "result of ours, seed 1",
    ]


def test_a_unit_fills_the_lanes_with_what_is_ready(benchmark):
    left = [
        piece
        for piece in benchmark.pieces(["qlora_all", "ours", "per_dataset"], range(3))
        if piece.kind in ("train", "result")
    ]
    settings: dict[str, list[str] | None] = {"qlora_all": ["a"], "ours": None, "per_dataset": ["a"] * 10}

    def unit(lanes: int) -> list[str]:
        return [str(piece) for piece in benchmark.next_unit(left, lambda piece: settings[piece.arm], lanes)]

    joint = [f"training of qlora_all, seed {seed}" for seed in range(3)]
    assert unit(1) == joint[:1]
    assert unit(2) == joint[:2]
    # The groups of ours are not known yet, and are passed over.
    assert unit(4) == [*joint, "training of per_dataset, seed 0"]
    assert unit(100) == [*joint, *(f"training of per_dataset, seed {seed}" for seed in range(3))]
    settings["per_dataset"] = ["b"] * 10
    assert unit(100) == joint
    results = [piece for piece in left if piece.kind == "result"]
    assert benchmark.next_unit(results, lambda piece: ["a"], 4) == results[:1]


def test_the_forecast_is_amount_times_rate(benchmark):
    done = [
        {"kind": "train", "amount": 100, "seconds": 50.0},
        {"kind": "train", "amount": 300, "seconds": 250.0},
        {"kind": "result", "amount": 1, "seconds": 8.0},
    ]
    assert benchmark.time_left({"train": 40, "result": 2, "search": 3}, done) == (pytest.approx(46.0), ["search"])


# Budgets ----------------------------------------------------------------------------------------------------------------


def test_steps_of_equal_flops_cost_at_least_as_much(arms):
    assert arms.equal_flops_steps(400, 800.0, 801.0) == 401
    assert arms.equal_flops_steps(400, 800.0, 1000.0) == 500
    assert arms.equal_flops_steps(400, 800.0, 500.0) == 400


def test_the_rate_is_chosen_by_the_search_s_measure(arms):
    reached = {"a": (0.5, 0.8), "b": (0.6, 0.9), "c": (0.55, 0.9)}
    assert arms.choose_rate(reached, "loss") == "a"
    assert arms.choose_rate(reached, "accuracy") == "c"
    scores = [np.log([[0.9, 0.1], [0.5, 0.5]]), np.log([[0.2, 0.8]])]
    loss, accuracy = arms.validation_means(scores, [np.array([0, 1]), np.array([1])])
    assert loss == pytest.approx((-np.log(0.9) / 2 - np.log(0.5) / 2 - np.log(0.8)) / 2)
    assert accuracy == pytest.approx(0.75)


@pytest.fixture
def experiment(benchmark, job, tmp_path):
    from ray_ensemble.config import load_config

    with ExitStack() as stack:
        yield benchmark.Experiment(tmp_path / "run", load_config(job), stack)


def test_every_partition_has_the_same_steps(experiment, arms):
    assert experiment.warm_up == 4
    assert experiment.shares == {"contrary": 2, "films": 3, "phones": 4}
    assert experiment.steps == 13
    assert experiment.config.training.min_steps == 0
    alone = [work.job.steps for work in arms.ARMS["per_dataset"].works(experiment, 0)]
    assert sum(alone) + experiment.warm_up == experiment.steps
    experiment.keep_by_hand([["phones", "films"], ["contrary"]], Path("groups.json"))
    by_hand = arms.ARMS["by_hand"].works(experiment, 1)
    assert [(work.job.members, work.job.steps) for work in by_hand] == [(("contrary",), 2), (("films", "phones"), 7)]
    assert experiment.wide(3).config.adapter.rank == 12
    assert experiment.wide(3).config.adapter.alpha == 96


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": ["films"]}, "a list of lists of dataset names"),
        ([["films", "phones", "contrary"], []], "a list of lists of dataset names"),
        ([["films", "phones"], ["films", "contrary"]], "films is in two groups or twice in one"),
        (
            [["films", "phones"], ["contrary", "tunes"]],
            "no dataset is called 'tunes'; there are contrary, films, phones",
        ),
        ([["films"], [["contrary"]]], "no dataset is called ['contrary']"),
        ([["films"]], "in no group: contrary, phones"),
    ],
)
def test_groups_by_hand_are_a_partition(experiment, groups, message):
    from ray_ensemble.errors import InputError

    with pytest.raises(InputError) as raised:
        experiment.keep_by_hand(groups, Path("groups.json"))
    assert str(raised.value).startswith("groups.json: ")
    assert message in str(raised.value)
    assert not experiment.hand_file.exists()


def test_a_folder_keeps_to_its_groups_by_hand(experiment):
    from ray_ensemble.errors import InputError

    experiment.keep_by_hand([["phones"], ["films", "contrary"]], Path("groups.json"))
    experiment.keep_by_hand([["contrary", "films"], ["phones"]], Path("same.json"))
    assert experiment.groups("by_hand", 0) == [["contrary", "films"], ["phones"]]
    with pytest.raises(InputError, match=r"by_hand\.json has other groups"):
        experiment.keep_by_hand([["phones", "films", "contrary"]], Path("other.json"))


def test_records_belong_to_a_job_and_its_data_wherever_they_lie(benchmark, job, tmp_path):
    from ray_ensemble.config import load_config
    from ray_ensemble.errors import InputError

    data = tmp_path / "tasks"
    for number, name in enumerate(TASKS):
        write_task(data / name, flip=name == "contrary", seed=number, train=8 + 4 * number)
    elsewhere = f"tasks=[{{source: {data}}}]"

    def claim(output: str, *changes: str) -> None:
        with ExitStack() as stack:
            config = load_config(job, list(changes))
            benchmark.Experiment(tmp_path / output, config, stack, tmp_path / "records").claim_records()

    claim("first")
    claim("second", elsewhere, "training.concurrency=2")  # another machine has its own paths and lanes
    with pytest.raises(
        InputError, match=r"records of another job \(training\.seed: 0 -> 7\); choose another --records"
    ):
        claim("third", "training.seed=7")
    write_task(data / "films", seed=9, train=12)
    with pytest.raises(InputError, match=r"records of another job \(tasks\)"):
        claim("fourth", elsewhere)


def planted(seed: int, skill: float, sizes: tuple[int, ...]) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = [np.arange(n) % 2 for n in sizes]
    return [generator.normal(size=(n, 2)) + skill * np.eye(2)[y] for n, y in zip(sizes, labels, strict=True)]


def test_a_damaged_record_is_named(benchmark, experiment):
    from ray_ensemble.errors import InputError

    result = sys.modules["classify10_experiment"].Result
    sizes = tuple(len(task["test"]) for task in experiment.job.encoded)
    scores = dict(zip(TASKS, planted(0, 1.0, sizes), strict=True))
    experiment.keep("ours", 0, result(scores))
    for kept, given in zip(experiment.scores("ours", 0), scores.values(), strict=True):
        np.testing.assert_allclose(kept, given, rtol=1e-6)
    file = experiment.record("ours", 0) / "films.npy"
    whole = file.read_bytes()
    np.save(file, np.zeros((3, 2)))
    with pytest.raises(InputError, match=r"films\.npy: scores \(3, 2\), but films has"):
        experiment.scores("ours", 0)
    file.write_bytes(whole[:100])
    with pytest.raises(InputError, match=r"films\.npy: cannot be read"):
        experiment.scores("ours", 0)
    file.unlink()
    with pytest.raises(InputError, match=r"films\.npy: cannot be read .*; delete .*seed-0 to have it made again"):
        experiment.scores("ours", 0)


def test_wrong_use_is_told(benchmark, job, tmp_path, capsys):
    for wrong, message in (
        ("--seeds 0", "--seeds 0: 1 at least"),
        ("--only 0", "invalid choice: '0'"),
        ("--seeds 2 --seed 2", "--seed 2: --seeds 2 are 0 to 1"),
    ):
        with pytest.raises(SystemExit):
            benchmark.main([str(job), "--output", str(tmp_path / "run"), *wrong.split()])
        assert message in capsys.readouterr().err
    assert benchmark.main([str(tmp_path / "none.yaml"), "--output", str(tmp_path / "run")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    assert benchmark.main([str(job), "--output", str(tmp_path / "run"), "--only", "by_hand"]) == 2
    assert "--groups FILE says which datasets go together" in capsys.readouterr().err
    assert benchmark.main([str(job), "--output", str(tmp_path / "run"), "--groups", str(tmp_path / "none.json")]) == 2
    assert "none.json: this file of groups is missing" in capsys.readouterr().err


# The whole --------------------------------------------------------------------------------------------------------------


def untimed(told: Any) -> Any:
    """Figures without seconds and memory, which no two runs share."""
    if isinstance(told, dict):
        return {key: untimed(value) for key, value in told.items() if key not in ("seconds", "peak_memory_bytes")}
    return [untimed(each) for each in told] if isinstance(told, list) else told


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3600)  # all arms twice
def test_a_whole_benchmark_and_one_in_pieces_agree(benchmark, arms, job, ray_cluster, tmp_path, capsys):
    groups = tmp_path / "groups.json"
    groups.write_text('[["films", "phones"], ["contrary"]]')

    def call(name: str, *more: str) -> int:
        if not (tmp_path / name).exists():
            more = (*more, "--groups", str(groups))  # told once, kept with the folder
        command = [str(job), "--output", str(tmp_path / name), "--json", str(tmp_path / f"{name}.json"), "--seeds", "2"]
        return benchmark.main([*command, *more])

    assert call("whole") == 0
    whole = json.loads((tmp_path / "whole.json").read_text())
    found = whole["arms"]
    assert list(found) == list(arms.ARMS)
    assert whole["left_out"] == []

    # Budgets: all but these have 4 + 9 steps, and what is trained has what it was to have.
    others = {"base": [0, 0], "qlora_tuned": [39, 39], "qlora_longer": found["qlora_longer"]["steps"]}
    for name, arm in found.items():
        assert arm["steps"] == others.get(name, [13, 13]), name
        assert arm["equal_steps"] is (name not in others)
    for record in (tmp_path / "whole" / "job" / "trained").glob("*/result.json"):
        trained = json.loads(record.read_text())
        assert trained["steps"] in (4, 2, 3, 4, 5, 6, 7, 13, *others["qlora_longer"]), trained
    for name in ("boosted", "qlora_longer"):
        assert len(found[name]["ratio"]) == 2
    for longer, boosted in zip(found["qlora_longer"]["ratio"], found["boosted"]["ratio"], strict=True):
        # A step more costs at most its longest batch.
        assert boosted * 0.95 < longer < boosted + 0.2
    assert found["ours"]["flops"].keys() == {"gradients", "search", "groups", "ensemble"}
    assert found["boosted"]["flops"].keys() == {"gradients", "search", "groups", "ensemble", "boosting"}
    assert [about["rank"] for about in found["qlora_wide"]["about"]] == [8, 8]
    for seed, about in enumerate(found["qlora_tuned"]["about"]):
        losses = {float(rate): each["loss"] for rate, each in about["validation"].items()}
        assert len(losses) == 3
        assert losses[min(losses, key=lambda rate: abs(rate - about["rate"]))] == min(losses.values())
        same = next(name for name in ("qlora_all", *arms.RATES) if found[name]["about"][seed]["rate"] == about["rate"])
        assert found["qlora_tuned"]["loss"]["by_seed"][seed] == found[same]["loss"]["by_seed"][seed]

    # What is told of the estimate is what the searches said of their groups, less what they said of all together.
    said = [json.loads(p.read_text()) for p in sorted((tmp_path / "whole").glob("partitions/found-*/partition.json"))]
    assert len(said) == 2
    for half, key in (("search", "search_objective"), ("held_out", "objective")):
        expected = np.mean([each[key] - each["references"]["together"][key] for each in said])
        assert found["ours"]["estimate"][half] == pytest.approx(expected, abs=1e-6)
    assert {name for name, arm in found.items() if "estimate" in arm} == {"ours", "random", "hidden_states", "by_hand"}
    assert "random: loss less that of all together, estimated " in "\n".join(
        sys.modules["classify10_table"].verdicts(whole)
    )

    # Again: nothing is left to do, and it tells the same to the last byte.
    first = (tmp_path / "whole.json").read_bytes()
    capsys.readouterr()
    assert call("whole", "--minutes", "0") == 0
    assert (tmp_path / "whole.json").read_bytes() == first

    # In as many calls as there are units.
    assert call("pieces", "--minutes", "0") == 1
    calls, told = 0, []
    while call("pieces", "--minutes", "1e-9") == 1:
        calls += 1
        assert calls < 100
        told.append(list(json.loads((tmp_path / "pieces.json").read_text())["arms"]))
    assert calls > 20
    assert told[0] == []
    assert "qlora_all" in told[len(told) // 2]
    assert "left; the same command goes on from here" in capsys.readouterr().out
    assert untimed(json.loads((tmp_path / "pieces.json").read_text())) == untimed(whole)


def leaves(told: Any, path: str = "") -> dict[str, Any]:
    """Every value of a JSON document by its path."""
    inner = told.items() if isinstance(told, dict) else enumerate(told) if isinstance(told, list) else ()
    below = {key: value for name, each in inner for key, value in leaves(each, f"{path}/{name}").items()}
    return below if isinstance(told, dict | list) else {path: told}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_records_of_another_folder_are_gone_on_from(benchmark, job, ray_cluster, tmp_path, capsys):
    """A second machine has the records and none of the adapters; what it adds is what the first would have added."""

    def call(name: str, *more: str) -> dict[str, Any]:
        places = ["--output", str(tmp_path / name), "--json", str(tmp_path / f"{name}.json")]
        assert benchmark.main([str(job), *places, *more]) == 0
        found = leaves(untimed(json.loads((tmp_path / f"{name}.json").read_text()))["arms"])
        # What was estimated is known where the searches are.
        return {key: value for key, value in found.items() if "/estimate/" not in key}

    def alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
        """Adapters that were trained beside others differ by rounding."""
        near = {
            key: pytest.approx(each, rel=1e-4, abs=1e-5) if isinstance(each, float) else each
            for key, each in expected.items()
        }
        differing = {key: (found.get(key), expected[key]) for key, each in near.items() if found.get(key) != each}
        assert not differing

    arms = ("qlora_all", "qlora_scaled", "ours", "own_group", "merged", "boosted")
    whole = call("whole", "--seeds", "2", "--only", *arms)
    records = ["--records", str(tmp_path / "records")]
    assert call("first", *records, "--seeds", "2", "--seed", "1", "--only", "qlora_all", "ours") == {}
    capsys.readouterr()
    # The other seed alone: nothing of the first is done again.
    two = call("second", *records, "--seeds", "2", "--only", "qlora_all", "ours")
    done = [line for line in capsys.readouterr().out.splitlines() if "pieces done" in line]
    assert len(done) in (5, 6)  # gradients, search, trainings in one unit or two, results
    assert not [line for line in done if "seed 1" in line]
    assert "/ours/accuracy/value" in two
    absent = "/minus/qlora_scaled/"
    both = {key: each for key, each in whole.items() if key.split("/")[1] in ("qlora_all", "ours")}
    alike(two, {key: each for key, each in both.items() if absent not in key})
    alike(call("third", *records, "--seeds", "2", "--only", *arms), whole)


@pytest.mark.ray
@pytest.mark.slow
def test_what_a_longer_training_would_cost_is_what_it_costs(benchmark, job, tiny_model, ray_cluster, tmp_path):
    from ray_ensemble.config import load_config

    for name in TASKS:
        write_task(tmp_path / "tasks" / name, train=16)

    def cost(name: str, *changes: str) -> tuple[Any, dict[str, float], float]:
        settings = [f"tasks=[{{source: {tmp_path / 'tasks'}}}]", *changes]
        options = [option for change in settings for option in ("--set", change)]
        command = [str(job), "--output", str(tmp_path / name), "--only", "ours", "qlora_all", "--seeds", "1", *options]
        assert benchmark.main(command) == 0
        with ExitStack() as stack:
            experiment = benchmark.Experiment(tmp_path / name, load_config(job, settings), stack)
            found = {arm: experiment.cost(arm, 0) for arm in ("ours", "qlora_all")}
            counted = sys.modules["classify10_lengths"].flops_at(experiment, found["ours"], found["qlora_all"], 6, 0.5)
        return found, *counted

    _, counted, one = cost("short", "training.epochs=2")
    found, as_it_was, _ = cost("long", "training.epochs=6", "gradients.max_examples=8")
    assert one == pytest.approx(found["qlora_all"]["flops"]["training"], rel=0.03)
    for part in ("groups", "gradients"):
        assert counted[part] == pytest.approx(found["ours"]["flops"][part], rel=0.03), part
        # A share is one of all training examples, also where half of them had gradients.
        assert as_it_was[part] == pytest.approx(found["ours"]["flops"][part], rel=1e-9), part
