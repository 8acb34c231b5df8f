"""How many training jobs a cluster holds at once: a worker is on one node, and a share of a GPU on one GPU."""

from __future__ import annotations

import pytest

from ray_ensemble.training import jobs
from ray_ensemble.training.jobs import _Demand, _fitting


@pytest.mark.parametrize(
    ("nodes", "demand", "expected"),
    [
        ([(2, 0)], (1, 1.0, 0.0), 2),
        ([(8, 0), (8, 0)], (1, 3.0, 0.0), 4),  # not 16 // 3
        ([(16, 2)], (1, 1.0, 0.6), 2),  # not 2 / 0.6
        ([(16, 2)], (1, 1.0, 0.5), 4),
        ([(16, 4)], (1, 1.0, 0.1), 16),  # by CPUs
        ([(16, 4), (16, 0)], (2, 1.0, 1.0), 2),
        ([(8, 1), (8, 1)], (1, 1.0, 2.0), 1),  # on no node: one, for which a cluster may grow
        ([(4, 0)], (1, 0.1, 0.0), 40),
    ],
)
def test_jobs_that_fit(monkeypatch, nodes, demand, expected):
    monkeypatch.setattr(jobs, "node_resources", lambda: [{"CPU": cpus, "GPU": gpus} for cpus, gpus in nodes])
    assert _fitting(_Demand(*demand)) == expected
