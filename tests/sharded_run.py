"""Runs a job on a cluster of its own in which every process notes what it holds of the base: job, run folder, overrides."""

from __future__ import annotations

import sys

import holdings

holdings.install()

if __name__ == "__main__":
    from ray_ensemble.runtime import prepare_environment

    prepare_environment()
    import ray

    ray.init(
        num_cpus=4,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        log_to_driver=False,
        object_store_memory=200 * 2**20,
        runtime_env={"worker_process_setup_hook": "holdings.install"},
    )
    from ray_ensemble import Job

    job, output, *overrides = sys.argv[1:]
    Job.from_yaml(job, overrides).run(output)
    ray.shutdown()
