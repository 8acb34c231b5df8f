"""A node, the driver or the head goes at a moment that the seed chooses: the run ends as if nothing had been.


One round again: `pytest tests/chaos/test_rounds.py -k "a_node and train-7"`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import (
    STAGES,
    Driver,
    Ledger,
    Node,
    Nodes,
    Reference,
    assert_undisturbed,
    copy_before,
    driver_on,
    finished_trials,
    title_of,
)

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(1800)]

ROUNDS = 10
DISTURBED = ("gradients", "search", "train")
GIVES_UP_S = 300.0  # a driver that lost its cluster: Ray looks for the head for a minute, more on a busy machine
AT_START_S = 10.0  # the first part of a stage, in which actors start


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with Nodes() as found:
        yield found


def progress(stage: str, reference: Reference, ledger: Ledger) -> tuple[Callable[[], int], int]:
    """How much of a stage is done, and of how much."""
    return {
        "gradients": (lambda: ledger.count("gradients/.parts"), reference.units),
        "search": (lambda: finished_trials(ledger.folder), reference.trials),
        "train": (lambda: sum(ledger.rows.values()), reference.steps),
    }[stage]


def wait_for_moment(chance: random.Random, stage: str, reference: Reference, ledger: Ledger, driver: Driver) -> str:
    """Wait until a share of the stage is done; returns what was waited for."""
    done, total = progress(stage, reference, ledger)
    moment = chance.randrange(total)
    manifest = driver.output / "manifests" / f"{STAGES[STAGES.index(stage) - 1]}.json"
    driver.wait_for(f"{moment} of {total} in {stage}", lambda: manifest.exists() and done() >= moment)
    if moment == 0:
        time.sleep(chance.uniform(0.0, AT_START_S))
    return f"{stage} at {moment} of {total}"


def replace(nodes: Nodes, victim: Node) -> None:
    nodes.kill(victim)
    nodes.add(wait=False)


@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.parametrize("stage", DISTURBED)
def test_a_node_is_lost(nodes, reference, stage, seed, tmp_path):
    chance = random.Random(f"node {stage} {seed}")
    output = copy_before(stage, reference, tmp_path / "run")
    with Ledger(output) as ledger, driver_on(nodes, reference.job, output, stage) as driver:
        print(wait_for_moment(chance, stage, reference, ledger, driver))
        assert driver.process.poll() is None
        replace(nodes, chance.choice(nodes.workers))
        driver.finish()
    ledger.assert_nothing_twice()
    assert_undisturbed(output, reference, stage)
    nodes.wait_for(3)


def test_a_node_is_lost_as_a_worker_is_told_to_train(nodes, reference, tmp_path):
    """Ray Train tries a job again whose workers die later, or while they are set up, but not where one dies in this call."""
    victims: list[Node] = []

    def told() -> bool:
        title = b"ray::RayTrainWorker.run_train_fn"
        victims[:] = [node for node in nodes.workers if any(title in title_of(pid) for pid in node.pids())]
        return bool(victims)

    output = copy_before("train", reference, tmp_path / "run")
    with Ledger(output) as ledger, driver_on(nodes, reference.job, output, "train") as driver:
        driver.wait_for("worker that is told to train", told)
        replace(nodes, victims[0])
        driver.finish()
    assert "lost an actor; goes on from the last checkpoint" in (tmp_path / "log.txt").read_text()
    ledger.assert_nothing_twice()
    assert_undisturbed(output, reference, "train")
    nodes.wait_for(3)


@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.parametrize("stage", DISTURBED)
def test_the_driver_dies(nodes, reference, stage, seed, tmp_path):
    chance = random.Random(f"driver {stage} {seed}")
    output = copy_before(stage, reference, tmp_path / "run")
    with Ledger(output) as ledger:
        with driver_on(nodes, reference.job, output, stage) as driver:
            print(wait_for_moment(chance, stage, reference, ledger, driver))
            assert driver.process.poll() is None
            driver.kill()
        with driver_on(nodes, reference.job, output, stage) as driver:
            driver.finish()
    ledger.assert_nothing_twice()
    assert_undisturbed(output, reference, stage)


def inside(stage: str, output: Path) -> bool:
    """Whether a stage has begun and left something unfinished."""
    before, scores = output / "manifests" / f"{STAGES[STAGES.index(stage) - 1]}.json", output / "scores"
    if stage in ("ensemble", "evaluate"):
        began = before.stat().st_mtime_ns if before.exists() else None
        return began is not None and any(path.stat().st_mtime_ns > began for path in scores.glob("*.npy"))
    return {
        "plan": (output / "lease.json").exists,
        "tasks": before.exists,  # it takes milliseconds
        "gradients": lambda: any((output / "gradients" / ".parts").glob("*.npz")),
        "search": (output / "affinity.json").exists,
        "train": lambda: any((output / "checkpoints").glob("*/step-*")),
        "report": before.exists,
    }[stage]()


@pytest.mark.parametrize("where", ["inside", "after"])
def test_the_driver_dies_in_every_stage(nodes, reference, where, tmp_path):
    """Eight kills of one run: inside every stage, or as soon as its manifest is there."""
    output = tmp_path / "run"
    with Ledger(output) as ledger:
        for stage in STAGES:
            manifest = output / "manifests" / f"{stage}.json"
            with driver_on(nodes, reference.job, output) as driver:
                driver.wait_for(
                    f"{where} {stage}", manifest.exists if where == "after" else lambda s=stage: inside(s, output)
                )
                driver.kill()
        with driver_on(nodes, reference.job, output) as driver:
            driver.finish()
    ledger.assert_nothing_twice()
    assert_undisturbed(output, reference)


@pytest.mark.parametrize("seed", range(3))
def test_the_head_is_lost(reference, seed, tmp_path):
    """In every disturbed stage of one run: its driver, if it is elsewhere, gives up by itself; a new cluster goes on."""
    output = tmp_path / "run"
    with Ledger(output) as ledger, Nodes() as nodes:
        for stage in DISTURBED:
            chance = random.Random(f"head {stage} {seed}")
            with driver_on(nodes, reference.job, output) as driver:
                print(wait_for_moment(chance, stage, reference, ledger, driver))
                nodes.kill_all()
                assert driver.process.wait(GIVES_UP_S) != 0
            nodes.start()
        with driver_on(nodes, reference.job, output) as driver:
            driver.finish()
    ledger.assert_nothing_twice()
    assert_undisturbed(output, reference)
