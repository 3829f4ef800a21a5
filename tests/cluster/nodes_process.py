"""Several Ray nodes on this machine in a process of their own, told what to do line by line.

Arguments: CPUs and GPUs of the head, and `dashboard` for one with its job server or
`client` for one with a client port. On stdin `remove INDEX` and
`add CPUS GPUS [NAME=VALUE ...]` (variables of the node's environment), each answered by one line on stdout; the first
line is the address, the job server's or the client port after it.
"""

from __future__ import annotations

import sys
from typing import Any

STORE = 80 * 2**20


def main() -> None:
    from ray.cluster_utils import Cluster

    head: dict[str, Any] = {"num_cpus": int(sys.argv[1]), "num_gpus": int(sys.argv[2]), "object_store_memory": STORE}
    # Any free ports: this machine may have other Rays, and an agent without its port starts no jobs.
    head |= {"include_dashboard": "dashboard" in sys.argv, "dashboard_port": 0, "dashboard_agent_listen_port": 0}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes: list[Any] = []
    print(cluster.address, cluster.webui_url or "", flush=True)
    try:
        for line in sys.stdin:
            word, *rest = line.split()
            if word == "add":
                cpus, gpus = map(int, rest[:2])
                own = dict(setting.split("=", 1) for setting in rest[2:])
                nodes.append(cluster.add_node(num_cpus=cpus, num_gpus=gpus, object_store_memory=STORE, env_vars=own))
            elif word == "remove":
                cluster.remove_node(nodes[int(rest[0])], allow_graceful=False)
            print(f"done {word}", flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
