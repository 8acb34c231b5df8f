"""Joins the cluster at RAY_ADDRESS and prints as JSON what is asked of it; run by harness.py.

    python asked.py nodes | actors | groups | free SECONDS

`free` waits so long for all CPUs to be free, and prints what then holds some.
"""

from __future__ import annotations

import json
import sys
import time


def main(what: str, seconds: float) -> None:
    import ray
    from ray.util import placement_group_table

    ray.init(log_to_driver=False, logging_level="ERROR")
    if what == "nodes":
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
        deadline = time.monotonic() + seconds
        while (free := ray.available_resources().get("CPU", 0.0)) != (whole := ray.cluster_resources().get("CPU", 0.0)):
            if time.monotonic() > deadline:
                break
            time.sleep(0.5)
        groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
        found = [] if free == whole else [{"free": free, "of": whole, "groups": groups}]
    print(json.dumps(found, default=str))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
