"""Joins the cluster at RAY_ADDRESS and prints as JSON what is asked of it; run by harness.py.

    python asked.py nodes COUNT | actors | groups | free SECONDS

`nodes` waits until so many are alive, unless COUNT is 0; `free` waits so long for all CPUs, and prints what then holds some.
"""

from __future__ import annotations

import json
import sys
import time

START_S = 240.0  # for nodes to come up


def main(what: str, number: float) -> None:
    import ray
    from ray.util import placement_group_table

    ray.init(log_to_driver=False, logging_level="ERROR")
    if what == "nodes":
        deadline = time.monotonic() + START_S
        while number and sum(node["Alive"] for node in ray.nodes()) != number and time.monotonic() < deadline:
            time.sleep(0.2)
        found = [
            {"id": node["NodeID"], "alive": node["Alive"], "labels": node["Labels"], "resources": node["Resources"]}
            for node in ray.nodes()
        ]
    elif what == "actors":
        found = [
            {
                "class": actor["ActorClassName"],
                "node": actor["Address"]["NodeID"],
                "state": actor["State"],
                "pid": actor["Pid"],
            }
            for actor in ray._private.state.actors().values()
        ]
    elif what == "groups":
        found = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    else:
        deadline = time.monotonic() + number
        while (free := ray.available_resources().get("CPU", 0.0)) != (whole := ray.cluster_resources().get("CPU", 0.0)):
            if time.monotonic() > deadline:
                break
            time.sleep(0.5)
        groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
        found = [] if free == whole else [{"free": free, "of": whole, "groups": groups}]
    print(json.dumps(found, default=str))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
