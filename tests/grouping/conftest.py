"""One small Ray cluster for the tests of the search, and what can be checked against by enumeration."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    import ray

    if ray.is_initialized():
        yield
        return
    with contextlib.ExitStack() as stack:
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=200 * 2**20,
        )
        stack.callback(ray.shutdown)
        yield
