"""The pool of actors: every unit once, whatever dies, and never more results than this process can take."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import ray
from ray import cloudpickle

from ray_ensemble.config import GradientsConfig, Range
from ray_ensemble.errors import InputError, RunError
from ray_ensemble.pool import PlainActors, PoolSize, map_units, pool_size

pytestmark = pytest.mark.ray
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import a test module


class Worker:
    """Does what its units say, and writes down each unit that it finishes."""

    def __init__(self, folder: Path, refuse: bool = False) -> None:
        if refuse:
            raise InputError("no such base")
        self.folder = folder

    def work(self, unit: str) -> str:
        what, _, argument = unit.partition(" ")
        first = not (self.folder / "marker").exists()
        if what == "dies" and (argument == "always" or first):
            (self.folder / "marker").touch()
            os._exit(1)
        if what == "refuses":
            raise InputError("label 3 is out of range")
        if what == "fails":
            raise ValueError("not a number")
        if what == "sleeps":
            time.sleep(float(argument))
        if what == "slow":  # the first actor that comes is slow ever after
            mine = self.folder / f"slow-{os.getpid()}"
            if not any(self.folder.glob("slow-*")):
                mine.touch()
            time.sleep(0.6 if mine.exists() else 0.01)
        with (self.folder / "log").open("a") as log:
            log.write(f"{os.getpid()} {unit}\n")
        return unit.upper()


def run(folder: Path, units: dict[str, str], size: PoolSize, on_result=None, in_flight: int = 1) -> dict[str, str]:
    results: dict[str, str] = {}

    def keep(name: str, result: str) -> None:
        assert name not in results
        results[name] = result
        if on_result:
            on_result(results)

    map_units(
        PlainActors(Worker, (folder,), GradientsConfig(), size),
        "work",
        units,
        size=size,
        on_result=keep,
        in_flight=in_flight,
    )
    return results


def lines(folder: Path) -> list[str]:
    return (folder / "log").read_text().splitlines()


def test_unit_of_a_dead_actor_is_given_out_again_and_nothing_is_done_twice(ray_cluster, tmp_path):
    units = {f"u{i}": f"plain {i}" for i in range(7)} | {"killer": "dies once"}
    results = run(tmp_path, units, PoolSize(2, 2))
    assert results == {name: unit.upper() for name, unit in units.items()}
    assert Counter(line.partition(" ")[2] for line in lines(tmp_path)) == Counter(units.values())


def test_a_result_that_went_with_its_node_is_made_again(ray_cluster, tmp_path, monkeypatch):
    """Large results lie in the object store of the actor's node until the driver asks for them."""
    get, lost = ray.get, []

    def get_but_one(reference, *args, **kwargs):
        found = get(reference, *args, **kwargs)
        if isinstance(found, str) and not lost:
            lost.append(found)
            raise ray.exceptions.ObjectLostError(reference.hex(), None, "")
        return found

    monkeypatch.setattr(ray, "get", get_but_one)
    units = {f"u{i}": f"plain {i}" for i in range(7)}
    assert run(tmp_path, units, PoolSize(2, 2)) == {name: unit.upper() for name, unit in units.items()}
    done = Counter(line.partition(" ")[2].upper() for line in lines(tmp_path))
    assert done[lost[0]] == 2


def test_unit_that_always_kills_its_actor_is_named(ray_cluster, tmp_path):
    with pytest.raises(RunError, match="poison: its worker died 4 times"):
        run(tmp_path, {"fine": "plain", "poison": "dies always"}, PoolSize(1, 1))


def test_errors_come_back_as_what_they_are(ray_cluster, tmp_path):
    with pytest.raises(InputError, match="label 3 is out of range"):
        run(tmp_path, {"u": "refuses"}, PoolSize(1, 1))
    with pytest.raises(RunError, match="u: ValueError: not a number"):
        run(tmp_path, {"u": "fails"}, PoolSize(1, 1))
    with pytest.raises(InputError, match=r"^no such base$"):
        map_units(
            PlainActors(Worker, (tmp_path, True), GradientsConfig(), PoolSize(1, 1)),
            "work",
            {"u": "x"},
            size=PoolSize(1, 1),
            on_result=lambda *_: None,
        )


def test_slow_actor_gets_less(ray_cluster, tmp_path):
    run(tmp_path, {f"u{i}": f"slow {i}" for i in range(12)}, PoolSize(2, 2))
    (slow,) = [path.name.removeprefix("slow-") for path in tmp_path.glob("slow-*")]
    counts = Counter(line.split()[0] for line in lines(tmp_path))
    assert len(counts) == 2, "the other actor came too late"
    assert counts[slow] < 12 - counts[slow]


@pytest.mark.parametrize("in_flight", [1, 2])
def test_results_wait_in_bounded_number(ray_cluster, tmp_path, in_flight):
    waiting = []

    def slow_reader(results: dict[str, str]) -> None:
        time.sleep(0.05)
        waiting.append(len(lines(tmp_path)) - len(results))

    run(tmp_path, {f"u{i}": f"plain {i}" for i in range(20)}, PoolSize(2, 2), slow_reader, in_flight)
    assert max(waiting) <= 2 * in_flight


def test_pool_grows_with_the_work_and_needs_no_more_than_the_cluster_has(ray_cluster, tmp_path):
    assert pool_size(Range(min=1, max=16), 1, 5) == PoolSize(1, 5)
    assert pool_size(3, 1, 2) == PoolSize(2, 2)
    assert pool_size("auto", 1, 1000, shards=10**6) == PoolSize(1, 1)
    (tmp_path / "small").mkdir()
    run(tmp_path / "small", {"u": "plain"}, PoolSize(1, 16))
    assert len(lines(tmp_path / "small")) == 1
    # Sixteen actors do not fit into the test cluster: those that do share the work, and the rest never come.
    units = {f"u{i}": f"sleeps 0.3 {i}".rpartition(" ")[0] for i in range(30)}
    results = run(tmp_path, units, PoolSize(1, 16))
    assert len(results) == 30
    assert len({line.split()[0] for line in lines(tmp_path)}) > 1


def test_what_the_cluster_can_never_place_ends_with_what_it_lacks(ray_cluster, tmp_path):
    import ray

    size, config = PoolSize(1, 1), GradientsConfig(threads=4096, gpus=2.0, wait_minutes=1e-3)
    actors = PlainActors(Worker, (tmp_path,), config, size)
    with pytest.raises(
        RunError, match=r"wait_minutes.*1 × 4096 CPUs and 2 GPUs asked for, each on one node; the cluster has"
    ):
        map_units(actors, "work", {"u": "x"}, size=size, on_result=lambda *_: None)
    assert ray.available_resources().get("CPU")
